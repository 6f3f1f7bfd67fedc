"""Formulas over tensors and scores: divergences in three spaces, scores with intervals, measures of collapse.

It imports `base` alone. Begin with `divergence.py`.
"""
