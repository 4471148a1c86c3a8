"""What every other package may use: errors, texts, progress, processes."""
