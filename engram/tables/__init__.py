from engram.tables.optimizers import RowAdam, RowRMS
from engram.tables.table import HostTable

__all__ = ["HostTable", "RowAdam", "RowRMS"]
