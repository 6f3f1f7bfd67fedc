"""Recipes: their fields and what is said about a wrong one, YAML as it was meant, and the files that a recipe names.

It imports `base` alone, and no torch. Begin with `recipe.py`.
"""
