"""What a recovery will probably bring, from a short trial and from runs that were made to the end.

It imports `report`, `config` and `base`. Begin with `advice.py`.
"""
