"""A load generator for image and video servers that speak the OpenAI API: `vllm-omni bench`.

`stats.py` is pure: arrivals, mixes, percentiles. `client.py` speaks HTTP. `load.py` runs requests in a closed or an
open loop. None of them knows our server or imports more than the standard library.
"""
