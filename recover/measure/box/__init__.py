"""What runs behind the wall: a program that a model wrote, and apart from it the tests that judge it.

Only Python's own packages are imported here: these modules are started without any other.
"""
