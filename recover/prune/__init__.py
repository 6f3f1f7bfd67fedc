"""What goes, and by which score: blocks and sublayers, width, Wanda, SparseGPT, magnitude, N:M.

It imports `models` and what lies below. Begin with `methods.py`.
"""
