"""A GGUF file of an exported folder, for llama.cpp: the writer with its vocabularies, and what it knows of each
family.

It imports `models` and what lies below. Begin with `write.py`.
"""
