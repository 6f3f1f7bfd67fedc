"""What a model can still do: tasks of every kind, their items and scores, and how fast it decodes.

It imports `text`, `models` and what lies below. Begin with `tasks.py`.
"""
