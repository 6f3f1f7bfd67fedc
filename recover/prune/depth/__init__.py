"""Depth pruning: which blocks or sublayers go, by which score, and what repairs the cut.

Begin with `depth.py`; `search.py` chooses, `scores.py` says what a choice costs, `repair.py` folds a repair in.
"""
