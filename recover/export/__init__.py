"""A checkpoint that stock tools load: merged, written, verified in a fresh process, with a model card.

It imports `models`, `report` and what lies below. Begin with `write.py`.
"""
