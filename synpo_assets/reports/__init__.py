"""What is read back of finished iterations: report, plots, comparison, lineage of a row."""
