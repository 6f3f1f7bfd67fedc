"""The commands: what each takes, and its help. `recover.cli` gives them their place and prints their errors.

A command is imported when the command line is; what it needs beyond `base` and `config`, when it is called. Begin
with `run.py`.
"""
