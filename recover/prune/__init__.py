"""What goes, and by which score: blocks and sublayers, width, Wanda, SparseGPT, magnitude, N:M.

`depth/` drops blocks and sublayers, `width.py` narrows every block, `sparsity.py` sets weights to zero. It imports
`models` and what lies below. Begin with `registry.py`.
"""
