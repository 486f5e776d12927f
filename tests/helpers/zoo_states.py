"""How each family of the zoo is served, as `tests/models/test_zoo.py` measures it; `docs/models.md` is made from it."""

from __future__ import annotations

from serving import Served

FULLY = Served(True, True)
STATES = {
    "FLUX.3": FULLY,
    "Bria 3.2": FULLY,
    "CogView3+": FULLY,
    "DiT": FULLY,
    "ERNIE-Image": Served(True, False, "joined with another call, the rows of its blocks are not its own"),
    "GLM-Image": Served(False, False, "it cannot be seen what is in its argument kv_caches"),
    "HunyuanDiT": FULLY,
    "HunyuanImage 2.1": FULLY,
    "Krea 2": FULLY,
    "Lumina": FULLY,
    "Nucleus-Image": FULLY,
    "Ovis-Image": FULLY,
    "PRX": FULLY,
    "Bria FIBO 2": FULLY,
    "LongCat-Image": FULLY,
    "Qwen-Image-2.1": Served(False, False, "it cannot be seen what is in its argument kv_cache"),
    "Qwen-Image-2.1, use_kv_cache=False": FULLY,
    "JoyImage-Edit": FULLY,
    "JoyImage-Edit-Plus": FULLY,
    "Qwen-Image-Layered": FULLY,
    "Bria FIBO": Served(True, False, "two calls cannot be joined"),
    "Ideogram 4": FULLY,
    "OmniGen": Served(
        True, False, "its positions are read from the first row: only requests with equal prompts share a forward"
    ),
    "Allegro": FULLY,
    "AnyFlow": FULLY,
    "AnyFlow FAR": Served(True, False, "two calls cannot be joined"),
    "ChronoEdit": FULLY,
    "Cosmos 1": FULLY,
    "Cosmos 2": FULLY,
    "ConsisID": Served(True, False, "a face is not given per row: only requests with the same one share a forward"),
    "Kandinsky 6 SR": FULLY,
    "Sana World Model": Served(True, False, "joined with another call, its output is not its own, its rows interact"),
    "EasyAnimate": FULLY,
    "Helios": FULLY,
    "FramePack": FULLY,
    "Latte": FULLY,
    "Motif-Video": FULLY,
    "Sana Video": FULLY,
    "SkyReels V2": FULLY,
    "SkyReels V2 diffusion forcing": Served(
        False, False, "each frame has a scheduler of its own: nothing says which step a call is"
    ),
    "Wan VACE": FULLY,
    "Wan Animate": FULLY,
    "LTX-2": FULLY,
    "Kandinsky 6": FULLY,
    "Cosmos 3": Served(True, False, "two calls cannot be joined"),
    "Stable Audio": FULLY,
    "Stable Audio 3": FULLY,
    "ACE-Step": FULLY,
    "LongCat-AudioDiT": FULLY,
}
