"""Distillation: the loss with its gradient, and both passes of a twin with it in one forward.

It imports `models` and what lies below. Begin with `distiller.py`, then `loss.py`.
"""
