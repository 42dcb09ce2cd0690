from engram.tables.encoded import EncodedTable, encode_table, report
from engram.tables.optimizers import RowAdam, RowRMS
from engram.tables.table import HostTable

__all__ = ["EncodedTable", "HostTable", "RowAdam", "RowRMS", "encode_table", "report"]
