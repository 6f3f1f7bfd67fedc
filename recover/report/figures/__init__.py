"""The pictures of a report, drawn as SVG: a module each, and `registry.py`, which says in which order they come.

They import the report's words and readers of files. Begin with `registry.py`.
"""
