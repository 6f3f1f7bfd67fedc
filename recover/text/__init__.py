"""What a model reads and writes: files of a user row by row, data that goes by a name, prompts as token ids, texts
written by cached and recorded steps, likelihoods, embeddings.

It imports `models` and what lies below. Begin with `generate.py`.
"""
