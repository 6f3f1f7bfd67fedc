"""A run: its folder, its stages, what each is made of and does, what it will cost, and what came of it.

It imports everything below the command line. Begin with `stages.py`, then `stage_work.py`.
"""
