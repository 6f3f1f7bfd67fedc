"""Probes: how far two views of a model are apart in three spaces, and where and when along their texts.

It imports `measure`, `text`, `models` and what lies below. Begin with `probe.py`.
"""
