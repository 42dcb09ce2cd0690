"""Names that scripts outside this repository use; they are defined in experiments.lab."""

from experiments.lab.cell import HOME, SETTINGS, Run, change, hook, names, questions
from experiments.lab.results import read_lines, read_results
from experiments.lab.tuning import rate_grid, tuned

__all__ = ["HOME", "SETTINGS", "Run", "change", "hook", "names", "questions"]
__all__ += ["rate_grid", "read_lines", "read_results", "tuned"]
