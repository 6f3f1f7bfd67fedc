"""One file a kind of task: its item, how a row makes one, and the record of a model on all of them.

`recover.config.tasks` says which kinds there are. It imports `measure/model.py`, where `Work` says what a kind has, and
what lies below. Begin with `choice.py`.
"""
