"""The pictures of a report, drawn as SVG: a module each subject; `figure.py` lays axes and marks out, and writes them.

They read `report/data.py`, and `report/exhibits.py` says where each stands. Begin with `figure.py`.
"""
