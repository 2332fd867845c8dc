"""Plugins that are broken on purpose, each in one way. The table in `mutants.py` says which check catches which."""
