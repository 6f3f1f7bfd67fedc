"""What a model can still do: its tasks, read, measured and scored, and how fast it decodes.

`kinds/` has a file a kind of task. It imports `text`, `models` and what lies below. Begin with `tasks.py`.
"""
