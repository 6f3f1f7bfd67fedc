"""A run: its folder, its stages, what each is made of and does, and what it will cost.

It imports everything below the command line. Begin with `stages.py`, then `stage_work.py`.
"""
