"""Engines and the front before them as events in time. Pure Python; `simulate.py` and `replicas.py` run it."""
