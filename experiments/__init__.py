"""The lab: questions about the memory, each a folder with its list of runs, its results, its figure and its table."""
