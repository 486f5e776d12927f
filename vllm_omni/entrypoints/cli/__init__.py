"""The commands of `vllm-omni`: `main.py` finds them, each has a module, `flags.py` makes their flags from settings."""
