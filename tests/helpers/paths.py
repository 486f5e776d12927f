"""Places in the checkout that tests read or run."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "vllm_omni" / "assets" / "demo"
PROBE = ROOT / "tests" / "probe"
EXAMPLES = ROOT / "examples"
