"""One file a kind of task: its item, how a row makes one, and the record of a model on all of them.

`recover.config.tasks` says which kinds there are. It imports `measure/model.py` and what lies below. Begin with
`work.py`.
"""
