"""A GGUF file of an exported folder, for llama.cpp: the writer, what it knows of each family, and vocabularies.

It imports `models` and what lies below. Begin with `write.py`.
"""
