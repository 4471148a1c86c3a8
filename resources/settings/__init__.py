"""The settings of an experiment, one file per section."""
