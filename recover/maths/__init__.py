"""Formulas over tensors and scores: divergences in three spaces, scores with intervals, what a text repeats.

It imports `base` alone. Begin with `divergence.py`.
"""
