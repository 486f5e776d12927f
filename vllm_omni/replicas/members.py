"""Which replicas there are, as whoever starts them last said, in this process."""

from __future__ import annotations

from collections.abc import Iterable

_members: set[str] = set()


def members() -> set[str]:
    """Their names."""
    return set(_members)


def note(names: Iterable[str]) -> None:
    """These there are, and no others."""
    kept = set(names)
    _members.intersection_update(kept)
    _members.update(kept)


def lost(name: str) -> None:
    """One has gone."""
    _members.discard(name)
