"""What is read back of finished iterations: report, plots, comparison, lineage of a row."""

# In the home, and below the address of the UI.
FOLDER = "reports"
REPORT = "boosting_report.html"
