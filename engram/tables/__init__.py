from engram.tables.optimizers import RowAdagrad, RowAdam, RowRMS
from engram.tables.sinkhorn import RowSinkhorn
from engram.tables.table import HostTable

__all__ = ["HostTable", "RowAdagrad", "RowAdam", "RowRMS", "RowSinkhorn"]
