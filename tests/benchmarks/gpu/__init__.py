"""What to run on a GPU to check correctness, speed and memory; README.md says how."""
