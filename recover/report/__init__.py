"""The page of a run, made from the files of its folder alone; of a diagnosis; and of several runs side by side.

`collect.py` reads the files of a run (`run_files.py` types them) into the types of `data.py`; `exhibits.py` lists the
sections, figures and tables of a page; `figures/` draws; `words.py` puts figures into words; `render.py` writes. It
imports `config`, `maths` and `base`, and no torch. Begin with `collect.py`, then `exhibits.py`.
"""
