"""Fused operations, and recordings of GPU work. Without this folder all numbers stay as they are, up to rounding; speed
goes.

It imports `base`. Begin with `fused.py`.
"""
