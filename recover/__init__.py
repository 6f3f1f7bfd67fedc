"""Prune a language model and get its generation back: prune, diagnose, recover, re-measure, export."""

__version__ = "0.1.0"
