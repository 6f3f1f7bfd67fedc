"""The page of a run, read from the run's files alone: as HTML, Markdown and JSON; and the comparison of several.

It imports `config` and `base`, and no torch. Begin with `collect.py`, then `render.py`.
"""
