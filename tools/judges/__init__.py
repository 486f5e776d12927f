"""Models that cannot be learnt by heart: procedural data without end, and small models of three architectures."""
