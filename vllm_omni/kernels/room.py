"""How many requests at once a device has room and time for, and what residuals may take: from what was measured.

A forward of n requests of one size takes `fixed + n * each` bytes beside what is held anyway, and `n * each` seconds.
Nothing is guessed of a kind of work that never ran; of a size that never ran, from the largest one that did.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from vllm_omni.logger import init_logger

logger = init_logger(__name__)
MARGIN = 1.1  # of each request's bytes: the next request may have a longer text
KEPT_SIZES = 256
ALWAYS = 16  # requests share a forward whatever it costs: so far gained, with the demo on one processor
TRIES = 8  # forwards from which the quickest is taken for what that many requests cost
PAYS = 1.03  # half as many are better if each takes so much less
FADES = 1.01  # a quickest time is forgotten by so much with each further one: the machine may have become slower
PATIENCE = 64  # turns at a limit after which more is tried
LEAST_KEPT = 2**20  # bytes of residuals from which their limit is raised


class Limit:
    """As many as there was room for. After `PATIENCE` turns at it twice as many are tried: others may have left room.

    Each time that this fails the next try waits twice as long, so that a limit that stands costs less and less.
    """

    def __init__(self, most: int, least: int = 1) -> None:
        """`least`: what is tried after 0."""
        self.most, self._least = most, least
        self._turns, self._patience, self._raised = 0, PATIENCE, False

    def lower(self, most: int) -> None:
        """Note that more than `most` had no room."""
        self._patience *= 2 if self._raised else 1
        self.most, self._turns, self._raised = most, 0, False

    def held(self) -> None:
        """Note a turn at the limit that went well."""
        self._turns += 1
        if self._turns >= self._patience:
            self.most, self._turns, self._raised = max(self._least, 2 * self.most), 0, True


class Limits:
    """Of the kinds and sizes of work that once had no room."""

    def __init__(self, rise: bool) -> None:
        """`rise`: they do so by and by. Several ranks must not try what may fail on one of them alone."""
        self._rise = rise
        self._limits: dict[Hashable, Limit] = {}

    def most(self, work: Hashable) -> int | None:
        """How many at once; None if nothing speaks against any number."""
        return limit.most if (limit := self._limits.get(work)) is not None else None

    def lower(self, work: Hashable, most: int) -> None:
        """Note that more than `most` had no room."""
        self._limits.setdefault(work, Limit(most)).lower(most)

    def held(self, work: Hashable, count: int) -> None:
        """Note that `count` at once had room."""
        if self._rise and (limit := self._limits.get(work)) is not None and count >= limit.most:
            limit.held()

    def bars(self, work: Hashable) -> bool:
        """Whether not a single one is to be tried; then a turn goes by without."""
        if barred := self.most(work) == 0:
            self.held(work, 0)
        return barred


class Work(NamedTuple):
    """A kind of work, and the size of a request in it."""

    kind: Hashable  # forwards with all blocks, those without, text encoders and decoders by their call
    size: Hashable
    elements: int = 0  # of what is worked on, latents for the most part, by which sizes are compared; 0: they cannot be

    @property
    def coding(self) -> bool:
        """Whether it is a text encoder's, or a decoder's."""
        return isinstance(self.kind, tuple)


class Held(Protocol):
    """Residuals: what they take, and what they may."""

    used: int
    budget: int | None


@dataclass
class Measured:
    """What a size took: the most bytes by the number of requests, and the seconds of each at best."""

    elements: int
    nbytes: dict[int, int] = field(default_factory=dict)
    each_s: float | None = None
    by_number: dict[int, tuple[float, int]] = field(default_factory=dict)  # by eights of requests: at best, how often

    @property
    def line(self) -> tuple[float, float]:
        """Bytes that do not depend on the number of requests, and those of each."""
        few, many = min(self.nbytes), max(self.nbytes)
        if few == many:
            return 0.0, self.nbytes[few] / few
        each = max(0.0, (self.nbytes[many] - self.nbytes[few]) / (many - few))
        return max(0.0, self.nbytes[few] - few * each), each


class Room:
    """Of one device: `free` bytes after the model is loaded, None on one that knows no limit.

    At most `most` requests run at a time. `loaded` bytes are in use before any of them.
    """

    def __init__(self, free: int | None, most: int, loaded: int = 0) -> None:
        self.free, self.most, self._loaded = free, most, loaded
        self._beside = 0  # what requests hold beside their residuals, when it was last seen
        self.longest_s: float | None = None  # that one turn of the engine's loop should take
        self._ceiling: Limit | None = None  # of the residuals, once they were found to be too many
        self._given: int | None = None  # their budget as somebody asked for it
        self._held: Held | None = None
        self._sizes: dict[Work, Measured] = {}
        self._budget_of: Hashable = None  # the kind of work that a whole batch is wanted for

    def govern(self, held: Held) -> None:
        """Set the residuals' budget, from now on with each new measurement, unless they have one."""
        self._held, self._given = held, held.budget
        held.budget = self.budget

    @property
    def kept(self) -> int:
        """Bytes of all residuals."""
        return 0 if self._held is None else self._held.used

    def keep_less(self, most: int) -> None:
        """Let residuals take no more than that, for now: more were in the way."""
        if self._ceiling is None:
            self._ceiling = Limit(most, LEAST_KEPT)
        self._ceiling.lower(min(most, self._ceiling.most))
        self._govern()
        logger.warning("residuals are kept in %d MiB for now", self._ceiling.most >> 20)

    def went_well(self) -> None:
        """Note a forward that had room at once: if residuals were many, in the end they may take more again."""
        if self._ceiling is not None and 2 * self.kept >= self._ceiling.most:
            self._ceiling.held()
            self._govern()

    def _govern(self) -> None:
        if self._held is not None:
            self._held.budget = self.budget

    @property
    def budget(self) -> int | None:
        """Bytes for residuals; None is no limit."""
        wanted = self._left if self._given is None else self._given
        ceiling = None if self._ceiling is None else self._ceiling.most
        return min((limit for limit in (wanted, ceiling) if limit is not None), default=None)

    @property
    def _left(self) -> int | None:
        """What a forward of all requests at once leaves, and half of what is free at least."""
        if self.free is None:
            return None
        works = {work: measured.line for work, measured in self._sizes.items() if measured.nbytes}
        free = self.free - self._beside
        alone = max((fixed + each for fixed, each in works.values()), default=free / 2)
        whole = [fixed + self.most * each for work, (fixed, each) in works.items() if work.kind == self._budget_of]
        forwards = max(alone, min(max(whole, default=free / 2), free / 2))
        return max(0, int(free - forwards))

    def unknown(self, work: Work, count: int) -> bool:
        """Whether it is worth measuring what `count` requests take."""
        if self.free is None:
            return False
        measured = self._of(work) if work in self._sizes else None
        return measured is None or not measured.nbytes or count > max(measured.nbytes) or count < min(measured.nbytes)

    def took(self, work: Work, count: int, nbytes: int, blocks: bool = False, beside: int = 0) -> None:
        """Note the bytes of a forward; `blocks`: it is the kind that the budget leaves room for.

        `beside`: bytes in use when it began, without the residuals.
        """
        self._of(work).nbytes[count] = nbytes
        self._beside = max(0, beside - self._loaded)
        if blocks:
            self._budget_of = work.kind
        self._govern()

    def lasted(self, work: Work, count: int, seconds: float) -> None:
        """Note the seconds of a forward."""
        measured, each = self._of(work), seconds / count
        measured.each_s = each if measured.each_s is None else min(each, measured.each_s)
        best, tries = measured.by_number.get(_eights(count), (each, 0))
        measured.by_number[_eights(count)] = min(each, best * FADES), tries + 1

    def pays(self, work: Work, count: int) -> int:
        """How many of `count` requests share a forward: as many as make it quicker for each, half of them if not.

        Of more than `ALWAYS`, half are tried, too, before it is known. What this decides depends on the clock.
        """
        if count <= ALWAYS or (known := self._sizes.get(work)) is None:
            return count
        half = (count + 1) // 2
        (each, tries), (halved, halves) = (known.by_number.get(_eights(n), (0.0, 0)) for n in (count, half))
        if tries < TRIES or (halves >= TRIES and each < PAYS * halved):
            return count
        return self.pays(work, half)

    def at_once(self, work: Work) -> int | None:
        """How many requests may share a forward, one at least; None if nothing speaks against any number."""
        limits = []
        if self.free is not None and (line := self._bytes_of(work)) is not None and line[1] > 0:
            held = self._held.used if self._held is not None else 0
            limits.append((self.free - self._beside - held - line[0]) / (MARGIN * line[1]))
        if self.longest_s is not None and (each := self._seconds_of(work)):
            limits.append(self.longest_s / each)
        return max(1, int(min(limits))) if limits else None

    def told(self) -> str:
        """What was found, in words; empty if nothing was, or nothing is limited."""
        works = [work for work, measured in self._sizes.items() if work.kind == self._budget_of and measured.nbytes]
        if self.free is None or not works:
            return ""
        work = max(works, key=lambda work: work.elements)
        fixed, each = self._sizes[work].line
        most, budget = min(self.most, self.at_once(work) or self.most), self.budget
        kept = "as their budget says" if self._held is None or budget is None else f"{budget / 2**20:.0f} MiB"
        return (
            f"{self.free / 2**20:.0f} MiB are free beside the model; a forward takes {fixed / 2**20:.1f} MiB and "
            f"{each / 2**20:.1f} MiB per request of {work.elements} latent elements: {most} of {self.most} at once; "
            f"residuals may take {kept}"
        )

    @property
    def largest(self) -> int:
        """Elements of the largest latents that have been denoised."""
        known = [work for work, measured in self._sizes.items() if measured.nbytes]
        return max((work.elements for work in known if not work.coding), default=0)

    def _of(self, work: Work) -> Measured:
        """What is known of a size, which becomes the last one to be forgotten: sizes are the clients' choice."""
        self._sizes[work] = measured = self._sizes.pop(work, None) or Measured(work.elements)
        if len(self._sizes) > KEPT_SIZES:
            del self._sizes[next(iter(self._sizes))]
        return measured

    def _bytes_of(self, work: Work) -> tuple[float, float] | None:
        known = self._sizes.get(work)
        if known is not None and known.nbytes:
            return known.line
        alike = [m for other, m in self._sizes.items() if other.kind == work.kind and m.nbytes and m.elements]
        if not alike or not work.elements:
            return None
        fixed, each = (largest := max(alike, key=lambda measured: measured.elements)).line
        return fixed, each * work.elements / largest.elements

    def _seconds_of(self, work: Work) -> float | None:
        """Of a size that never ran: attention takes more than its share of a larger one."""
        known = self._sizes.get(work)
        if known is not None and known.each_s is not None:
            return known.each_s
        alike = [m for other, m in self._sizes.items() if other.kind == work.kind and m.each_s and m.elements]
        if not alike or not work.elements:
            return None
        largest = max(alike, key=lambda measured: measured.elements)
        more = work.elements / largest.elements
        return (largest.each_s or 0.0) * max(more, more**2)


def _eights(count: int) -> int:
    return -(-count // 8)
