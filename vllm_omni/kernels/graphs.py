"""What torch.compile has made of a model: how many graphs, and where one had to be broken."""

from __future__ import annotations

from collections.abc import Iterator

SHOWN = 3


def graphs_made() -> int:
    """Graphs that this process has compiled so far."""
    from torch._dynamo.utils import counters  # seconds of imports, which only a compiled model needs

    return int(counters["stats"]["unique_graphs"])


def graph_breaks() -> Iterator[str]:
    """The reasons for which Python had to run between two graphs, the most frequent first."""
    from torch._dynamo.utils import counters

    for reason, times in counters["graph_break"].most_common(SHOWN):
        lines = [line.strip() for line in str(reason).splitlines() if line.strip()]
        yield f"{lines[0] if lines else 'unknown'} ({times} times)"
