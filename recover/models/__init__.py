"""Models: where the parts of each family are, how a checkpoint is loaded, and the twin: one set of weights in two
views, dense and pruned.

They import `kernels`, `maths`, `config` and `base`. Begin with `twin.py`.
"""
