"""Row-sparse optimizers: row gradients -> updated rows. They touch the rows of the step and nothing else.

Duplicate rows of one step sum their gradients first, in the order in which they came, so a step is deterministic
whatever the number of threads. State lies beside the rows, in host memory or in a file next to the table's.
"""

from engram.tables.optimizers.adam import RowAdam
from engram.tables.optimizers.base import RowOptimizer
from engram.tables.optimizers.entries import SMALLEST, Entries
from engram.tables.optimizers.moment import RowAdagrad, RowRMS
from engram.tables.optimizers.sinkhorn import RowSinkhorn

__all__ = ["SMALLEST", "Entries", "RowAdagrad", "RowAdam", "RowOptimizer", "RowRMS", "RowSinkhorn"]
