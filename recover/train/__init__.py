"""Training: text (`data`, `sources`), the `trainer`, what happens around its steps (`callbacks`), and `checkpoints`."""
