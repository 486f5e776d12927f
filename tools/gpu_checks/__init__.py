"""What `tools/gpu_check.py` measures, on what models, and what it asks of a device."""
