"""Depth pruning: which blocks or sublayers go, by which score, and what repairs the cut.

Begin with `depth.py`, which also folds a repair in; `search.py` chooses, `scores.py` says what a choice costs.
"""
