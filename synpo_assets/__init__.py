"""The pipeline: its stages, what measures them, reports, publishing and the command."""
