"""The scheduling policy, without any model."""

from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_omni.diffusion.scheduler import AGEING_S, PATIENCE, StepKind, StepScheduler


def test_encoders_and_decoders_wait_where_they_would_evict_the_denoiser() -> None:
    """Until half of the requests are there, or for eight forwards."""

    def turns(last: bool, encode: int, compute: int) -> int:
        """Forwards before the first text is encoded."""
        scheduler = StepScheduler(8, components_last=last)
        names = {f"encodes {i}": StepKind.COMPONENT for i in range(encode)}
        names |= {f"computes {i}": StepKind.COMPUTE for i in range(compute)}
        for name, kind in names.items():
            scheduler.add(name)
            scheduler.admit()
            scheduler.park(name, "key", kind)
        for turn in range(20):
            batch = scheduler.schedule()
            if batch[0].startswith("encodes"):
                return turn
            for name in batch:
                scheduler.park(name, "key", StepKind.COMPUTE)
        return 20

    assert turns(False, 1, 3) == 0
    assert turns(True, 1, 3) == PATIENCE - 1
    assert turns(True, 2, 2) == turns(True, 1, 0) == 0


def test_groups_that_would_evict_each_others_denoiser_go_on_for_some_forwards() -> None:
    def swaps(last: bool) -> tuple[int, int]:
        """How often another group went on in 40 forwards, and the most forwards that one has waited."""
        scheduler, order = StepScheduler(8, components_last=last), []
        for name in ("high", "low"):
            scheduler.add(name)
            scheduler.admit()
            scheduler.park(name, name, StepKind.COMPUTE)
        for _ in range(40):
            (name,) = scheduler.schedule()
            order.append(name)
            scheduler.park(name, name, StepKind.COMPUTE)
        changes = [i for i in range(1, 40) if order[i] != order[i - 1]]
        return len(changes), max(b - a for a, b in zip([0, *changes], [*changes, 40], strict=True))

    assert swaps(False) == (39, 1)
    often, longest = swaps(True)
    assert 4 <= often <= 6 and longest <= PATIENCE


def test_admission_is_first_come_first_served_up_to_the_limit() -> None:
    scheduler = StepScheduler(2)
    for name in "abc":
        scheduler.add(name)
    assert scheduler.admit() == ["a", "b"]
    assert scheduler.admit() == []
    scheduler.remove("a")
    assert scheduler.admit() == ["c"]


def test_skipped_steps_run_first_then_components_and_equal_keys_share_a_batch() -> None:
    scheduler = StepScheduler(8)
    for name in "abcd":
        scheduler.add(name)
    scheduler.admit()
    scheduler.park("a", "k", StepKind.COMPUTE)
    scheduler.park("b", "k", StepKind.SKIP)
    scheduler.park("c", "other", StepKind.SKIP)
    scheduler.park("d", "k", StepKind.COMPUTE)
    assert scheduler.schedule() == ["b"]
    scheduler.park("b", "k", StepKind.COMPUTE)
    assert scheduler.schedule() == ["c"]
    scheduler.park("c", "vae", StepKind.COMPONENT)
    assert scheduler.schedule() == ["c"]
    scheduler.park("c", "other", StepKind.COMPUTE)
    assert scheduler.schedule() == ["a", "b", "d"]


def test_the_group_that_waits_longest_runs_next() -> None:
    scheduler = StepScheduler(8)
    for name in "ab":
        scheduler.add(name)
    scheduler.admit()
    scheduler.park("a", "x", StepKind.COMPUTE)
    scheduler.park("b", "y", StepKind.COMPUTE)
    turns = []
    for _ in range(6):
        (name,) = scheduler.schedule()
        turns.append(name)
        scheduler.park(name, "x" if name == "a" else "y", StepKind.COMPUTE)
    assert turns == ["a", "b"] * 3


def test_remove_drops_waiting_and_running_requests() -> None:
    scheduler = StepScheduler(1)
    scheduler.add("a")
    scheduler.add("b")
    scheduler.admit()
    scheduler.remove("b")
    scheduler.remove("a")
    scheduler.remove("never seen")
    assert len(scheduler) == 0 and scheduler.schedule() == []


def test_priority_decides_until_age_outweighs_it() -> None:
    scheduler = StepScheduler(1)
    scheduler.add("old", 0, arrived=0.0)
    scheduler.add("urgent", -1, arrived=AGEING_S - 1)  # a level is worth AGEING_S seconds of waiting, and no more
    scheduler.add("later urgent", -1, arrived=AGEING_S + 1)
    scheduler.add("twin", 0, arrived=0.0)
    assert scheduler.waiting == ["urgent", "old", "twin", "later urgent"]


@settings(deadline=None)
@given(st.lists(st.tuples(st.floats(0, 1000), st.integers(-10, 10)), min_size=2, max_size=20))
def test_a_request_is_overtaken_only_within_its_priority_disadvantage(asked: list[tuple[float, int]]) -> None:
    scheduler = StepScheduler(1)
    for i, (arrived, priority) in enumerate(asked):
        scheduler.add(str(i), priority, arrived)
    order = [int(name) for name in scheduler.waiting]
    for place, one in enumerate(order):
        for other in order[place + 1 :]:
            (came, level), (its_coming, its_level) = asked[one], asked[other]
            assert came <= its_coming + AGEING_S * (its_level - level) + 1e-6
