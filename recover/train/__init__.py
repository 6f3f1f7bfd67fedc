"""Recovery: its text, the trainer, what happens around its steps, checkpoints, text of the pruned model's own.

It imports `distill`, `text`, `models` and what lies below. Begin with `trainer.py`.
"""
