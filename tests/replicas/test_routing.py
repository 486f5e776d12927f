"""The rule by which a replica is chosen, against engines that are simulated row by row; and what makes one unable."""

from __future__ import annotations

import math
import random
import subprocess
import sys

import pytest
from paths import ROOT

from vllm_omni.replicas.routing import LOOKED_AT, Asked, Load, added_delay, choose, delay_at

TICK = 0.01


def ends(jobs: list[tuple[float, int]], unshared: float) -> list[float]:
    """When each job ends in an engine that takes sizes in turn, a forward of one tick per row by itself at a time."""
    left = [seconds for seconds, _ in jobs]
    done = [0.0] * len(jobs)
    clock, turn = 0.0, 0
    sizes = sorted({size for _, size in jobs})
    while any(seconds > 1e-9 for seconds in left):
        size = sizes[turn % len(sizes)]
        turn += 1
        rows = [i for i, (_, own) in enumerate(jobs) if own == size and left[i] > 1e-9]
        if not rows:
            continue
        clock += TICK * ((1 - unshared) + unshared * len(rows))
        for i in rows:
            left[i] -= TICK
            done[i] = clock
    return done


@pytest.mark.parametrize("unshared", [0.0, 0.3, 0.7, 1.0])
@pytest.mark.parametrize("number", range(12))
def test_the_delay_is_that_of_an_engine_simulated_forward_by_forward(unshared: float, number: int) -> None:
    """But for whose turn it is when the request comes."""
    draw = random.Random(number)
    jobs = [(draw.randint(1, 300) * TICK, draw.choice([1, 2, 3])) for _ in range(draw.randint(0, 6))]
    seconds, pixels = draw.randint(1, 300) * TICK, draw.choice([1, 2, 3])
    before, after = ends(jobs, unshared), ends([*jobs, (seconds, pixels)], unshared)
    truth = after[-1] + sum(late - early for early, late in zip(before, after[:-1], strict=True))
    assert added_delay(jobs, seconds, pixels, unshared) == pytest.approx(truth, abs=TICK * (1 + len(jobs)) ** 2)


def test_an_empty_engine_delays_by_the_request_alone_and_each_job_adds() -> None:
    assert added_delay([], 3.0, 1, 0.4) == pytest.approx(3.0)
    assert added_delay([(2.0, 1)], 3.0, 1, 1.0) == pytest.approx(3.0 + 2.0 + 2.0)
    assert added_delay([(2.0, 1)], 3.0, 1, 0.0) == pytest.approx(3.0)  # its row costs nothing in company
    assert added_delay([(9.0, 1)], 3.0, 1, 0.5) == pytest.approx(0.5 * 6 + 0.5 * 3 + 0.5 * 3)
    grown = [added_delay([(1.0, 1)] * n, 1.0, 1, 0.4) for n in range(6)]
    assert grown == sorted(grown) and len(set(grown)) == 6


def test_a_long_job_is_better_company_than_several_short_ones_for_a_short_request() -> None:
    """What a count or a sum of seconds gets wrong, each in its way."""
    draw = random.Random(0)
    one_long, two_short = Load([(100.0, 1)], 1.0), Load([(5.0, 1), (5.0, 1)], 1.0)
    assert choose([one_long, two_short], Asked(4.0, 1), draw) == 0  # the sum of seconds would say 1
    assert choose([Load([(1.0, 1), (1.0, 1)], 1.0), one_long], Asked(50.0, 1), draw) == 0  # the count would say 1


def test_those_of_one_size_keep_together_where_that_pays() -> None:
    loads = [Load([(5.0, 64)], 0.2), Load([(5.0, 128)], 0.2)]
    draw = random.Random(0)
    assert [choose(loads, Asked(5.0, pixels), draw) for pixels in (64, 128)] == [0, 1]


def test_what_a_replica_lacks_is_an_infinite_delay() -> None:
    draw, style = random.Random(0), Asked(1.0, 1, frozenset({"style"}))
    able, asleep = Load([(9.0, 1)] * 9, adapters=frozenset({"style"})), Load(able=False, adapters=frozenset({"style"}))
    bare = Load(adapters=frozenset())
    assert choose([asleep, bare, able], style, draw) == 2
    assert choose([asleep, bare], style, draw) is None and delay_at(bare, style) == math.inf
    assert choose([asleep, bare, able], Asked(1.0, 1), draw) == 1
    assert choose([], style, draw) is None


def test_equal_replicas_are_drawn_alike() -> None:
    draw = random.Random(1)
    drawn = [choose([Load()] * 4, Asked(1.0, 1), draw) for _ in range(4000)]
    assert all(900 < drawn.count(index) < 1100 for index in range(4))


def test_of_many_replicas_some_are_looked_at_and_all_if_none_of_them_can() -> None:
    draw = random.Random(2)
    busy = [Load([(1.0, 1)]) for _ in range(1000)]
    assert len({choose(busy, Asked(1.0, 1), draw) for _ in range(200)}) > 150
    only = [Load(able=False)] * 999 + [Load()]
    assert choose(only, Asked(1.0, 1), draw) == 999 and len(only) > LOOKED_AT


def test_the_rule_imports_nothing_but_the_standard_library() -> None:
    """The simulator runs it as it is."""
    code = "import sys; import vllm_omni.replicas.routing; print({'torch', 'pydantic', 'numpy'} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert run.stdout.strip() == "set()"
