"""The scheduling policy, without any model."""

from vllm_omni.diffusion.sched.step_scheduler import StepScheduler


def test_admission_is_first_come_first_served_up_to_the_limit() -> None:
    scheduler = StepScheduler(2)
    for name in "abc":
        scheduler.add(name)
    assert scheduler.admit() == ["a", "b"]
    assert scheduler.admit() == []
    scheduler.remove("a")
    assert scheduler.admit() == ["c"]


def test_skips_go_before_computes_and_equal_keys_go_together() -> None:
    scheduler = StepScheduler(8)
    for name in "abcd":
        scheduler.add(name)
    scheduler.admit()
    scheduler.park("a", "k", False)
    scheduler.park("b", "k", True)
    scheduler.park("c", "other", True)
    scheduler.park("d", "k", False)
    assert scheduler.schedule() == ["b"]
    scheduler.park("b", "k", False)
    assert scheduler.schedule() == ["c"]
    scheduler.park("c", "other", False)
    assert scheduler.schedule() == ["a", "b", "d"]


def test_the_group_that_waits_longest_is_next() -> None:
    scheduler = StepScheduler(8)
    for name in "ab":
        scheduler.add(name)
    scheduler.admit()
    scheduler.park("a", "x", False)
    scheduler.park("b", "y", False)
    turns = []
    for _ in range(6):
        (name,) = scheduler.schedule()
        turns.append(name)
        scheduler.park(name, "x" if name == "a" else "y", False)
    assert turns == ["a", "b"] * 3


def test_remove_forgets_waiting_and_running() -> None:
    scheduler = StepScheduler(1)
    scheduler.add("a")
    scheduler.add("b")
    scheduler.admit()
    scheduler.remove("b")
    scheduler.remove("a")
    scheduler.remove("never seen")
    assert len(scheduler) == 0 and scheduler.schedule() == []
