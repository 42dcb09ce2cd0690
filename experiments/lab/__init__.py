"""Parts that all questions share: cells, results, tuning, the runner, tables, claims and figures."""
