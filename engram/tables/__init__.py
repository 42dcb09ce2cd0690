from engram.tables.encoded import EncodedTable, encode_table, report
from engram.tables.optimizers import RowAdagrad, RowAdam, RowRMS, RowSinkhorn
from engram.tables.protocol import Table
from engram.tables.table import HostTable

__all__ = [
    "EncodedTable",
    "HostTable",
    "RowAdagrad",
    "RowAdam",
    "RowRMS",
    "RowSinkhorn",
    "Table",
    "encode_table",
    "report",
]
