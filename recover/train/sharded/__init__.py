"""Frozen weights dealt out over processes: their buffers, the way between GPUs, and ZeRO-3.

Begin with `weights.py`.
"""
