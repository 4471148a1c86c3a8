"""What the pipeline runs on: settings, models, trainers, scorer, storage."""
