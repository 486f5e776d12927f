"""What is known of the HTTP request being served, for its span and its log line. Never a prompt.

The facts live in a context variable: every task that serves the request inherits it, so whoever learns something
(how many steps were skipped, say) notes it without knowing who will read it.
"""

from __future__ import annotations

from contextvars import ContextVar

Fact = str | int | float
_FACTS: ContextVar[dict[str, Fact] | None] = ContextVar("facts", default=None)


def begin(**known: Fact) -> dict[str, Fact]:
    """Fresh facts for the request that this task serves."""
    facts = dict(known)
    _FACTS.set(facts)
    return facts


def note(**known: Fact) -> None:
    """Add facts; nothing happens outside a request."""
    if (facts := _FACTS.get()) is not None:
        facts.update(known)


def count(**amounts: int) -> None:
    """Add to facts that are sums."""
    if (facts := _FACTS.get()) is not None:
        for name, amount in amounts.items():
            facts[name] = int(facts.get(name, 0)) + amount
