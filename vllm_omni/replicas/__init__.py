"""Several engines behind one front: which of them takes a request, and what happens when one of them dies."""

from __future__ import annotations
