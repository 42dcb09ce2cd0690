from engram.tables.hot_rows import HotRows
from engram.tables.optimizers import RowAdam, RowRMS
from engram.tables.table import HostTable

__all__ = ["HostTable", "HotRows", "RowAdam", "RowRMS"]
