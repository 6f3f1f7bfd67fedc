"""What every other folder stands on: errors, processes, the console, files that are whole or not there,
provenance, and whose a folder is.

It imports nothing of recover, and no torch until it is called. Begin with `artifacts.py`.
"""
