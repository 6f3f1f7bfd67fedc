"""Probes: how far two views of a model are apart (`spaces`), and where and when along their texts (`probe`)."""
