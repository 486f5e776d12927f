"""The version, standard library only."""

__version__ = "0.1.0"
