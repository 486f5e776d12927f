"""A denoiser is understood by looking at it, and what was seen is proven on it: equal to every description there is,
and wrong about none of the models that are easy to misunderstand.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import trap_models as traps
from closeness import assert_close

from vllm_omni.diffusion.denoiser.block_stack import BlockStack
from vllm_omni.diffusion.denoiser.discover import signature_of
from vllm_omni.diffusion.denoiser.known import SIZES_LIKE, Denoiser, _file_of
from vllm_omni.diffusion.denoiser.prove import Finding, examine
from vllm_omni.diffusion.denoiser.rows import READ_AGAIN, equal, joined, latents_of, take_rows
from vllm_omni.diffusion.worker.batching import CallBinder
from vllm_omni.errors import InvalidValueError

TEXT = {"text": traps.text_of()}
PLACES = {"places": torch.arange(6).flip(0)[None]}
CACHED = {  # how each is cached: lists, what of them, and whether every block has a stand-in
    traps.Plain: (["trunk"], ("img",), False, {}),
    traps.Sequential: (["trunk"], ("src",), False, {}),
    traps.LongSkip: (["trunk"], ("img",), False, {}),
    traps.ByPosition: (["trunk"], ("img",), True, {}),
    traps.AddsBetween: (["trunk"], ("img",), True, {}),
    traps.Skips: (["trunk"], ("img",), False, {}),
    traps.Nested: (["shell.core.trunk"], ("img",), False, {}),
    traps.InPlace: (["trunk"], ("img",), False, {}),
    traps.Joint: (["pairs", "tail"], ("img",), False, TEXT),
    traps.EncoderDecoder: (["pairs"], ("img",), True, TEXT),
    traps.ReadsText: (["pairs", "tail"], ("img", "txt"), False, TEXT),
    traps.Positions: (["trunk"], ("img",), False, PLACES),
    traps.BatchMean: (["trunk"], ("img",), False, {}),
}
UNCACHED = {  # and what it says of the others
    traps.EarlyRead: "its output is not made of what trunk return",
    traps.Parallel: r"no chain of its block lists does most of the work \(trunk 50%, other 50%\)",
    traps.Twice: "blocks of trunk run more than once in a call",
    traps.Unused: "its output is not made of what trunk return",
    traps.ReturnsMore: "blocks of trunk return something that the next ones do not get",
    traps.Without: "no list of blocks runs in it",
    traps.Boxed: "it cannot be seen what is in its output",
    traps.Remembers: "the same call gives another output: it keeps state, or is random",
    traps.Compares: "the same call gives another output: it keeps state, or is random",
    traps.Counts: "the same call gives another output: it keeps state, or is random",
    traps.Noisy: "the same call gives another output: it keeps state, or is random",
}
ALONE = {traps.Boxed, traps.BatchMean, traps.BatchNorm, traps.Remembers, traps.Compares, traps.Counts, traps.Noisy}


def found(model: Any, arguments: dict[str, Any]) -> Finding:
    return examine(model, lambda given: model(**given), arguments, None)


def test_what_a_model_notes_in_place_is_as_it_was() -> None:
    model = traps.made(traps.KeepsMean)
    model.mean.fill_(3.0)
    random.seed(1)
    np.random.seed(1)
    states = model.draws.get_state(), random.getstate(), np.random.get_state()[1].copy()
    assert found(model, traps.call_of()).cached
    assert torch.equal(model.mean, torch.full((6, 4), 3.0)) and float(model.kept[0]) == 0
    assert torch.equal(model.draws.get_state(), states[0]) and random.getstate() == states[1]
    assert (np.random.get_state()[1] == states[2]).all()


def test_findings_are_kept_for_a_model_that_is_made_alike_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_OMNI_PROFILES", str(tmp_path))
    one, other, training, wider = (traps.made(traps.Plain) for _ in range(4))
    other.mixes, wider = True, wider.double()
    training.train()
    files = [_file_of(model) for model in (one, other, training, wider)]
    assert len(set(files)) == 4 and files[0] == _file_of(traps.made(traps.Plain))


def test_a_small_argument_that_is_written_in_place_is_read_again() -> None:
    memory: dict[int, Any] = {}
    when = torch.tensor(1.0)
    first = equal(when, memory)
    when.fill_(2.0)
    assert equal(when, memory) != first
    when.fill_(1.0)
    assert equal(when, memory) == first == equal(torch.tensor(1.0), {})
    turned = torch.arange(6.0).reshape(2, 3).T  # its bytes are not in its own order
    before = equal(turned, memory)
    turned[0, 0] = 7.0
    assert equal(turned, memory) != before
    large, known = torch.zeros(READ_AGAIN + 1), len(memory)
    assert equal(large, memory) == equal(large, memory) and len(memory) == known + 1


def test_an_argument_by_place_that_has_no_name_is_refused() -> None:
    class Conditions(traps.Plain):
        def forward(self, noisy: Any, when: Any, *conditions: Any) -> Any:
            return super().forward(noisy, when)

    binder = CallBinder("transformer", Denoiser(traps.made(Conditions)))
    call = traps.call_of()
    assert set(binder.bind((call["noisy"], call["when"]), {})) == {"noisy", "when"}
    with pytest.raises(InvalidValueError, match="by place"):
        binder.bind((call["noisy"], call["when"], call["noisy"]), {})


@pytest.mark.parametrize("kind", CACHED, ids=lambda kind: kind.__name__)
def test_what_can_be_cached_is(kind: type) -> None:
    lists, streams, every_place, more = CACHED[kind]
    model = traps.made(kind)
    arguments = traps.call_of(**more)
    finding = found(model, arguments)
    assert finding.cached, finding.reason
    assert [block_list.name for block_list in finding.spec.stack] == lists
    assert finding.spec.stack[0].streams == streams
    assert (finding.spec.every_place, finding.spec.in_place) == (every_place, kind is traps.InPlace)
    assert finding.joined is (kind not in ALONE)
    check_cached(model, finding, more)


def check_cached(model: Any, finding: Finding, more: dict[str, Any]) -> None:
    """A call that the proof has not seen is what it was, without a block, if its own residual stands in for them."""
    stack, ran = BlockStack(model, finding.spec), []
    for block_list in finding.spec.stack:
        for block in model.get_submodule(block_list.name):
            block.register_forward_hook(lambda *_: ran.append(1))
    call = traps.call_of(5, 2, **{n: torch.cat([v, v]) for n, v in more.items()})
    plain, replaced = with_its_residual(model, stack, call, ran)
    assert_close(replaced, plain)
    assert not ran


def with_its_residual(model: Any, stack: BlockStack, call: dict[str, Any], ran: list[int]) -> tuple[Any, Any]:
    """The output, and that with the blocks replaced by what they have added."""
    rows = len(call["noisy"])
    stack.enter(None, rows)
    plain, ends = model(**call), stack.ends()
    stack.leave()
    assert ends is not None
    ran.clear()
    stack.enter(lambda x: x + (ends[0] - ends[1]), rows)
    replaced = model(**call)
    stack.leave()
    return plain, replaced


@pytest.mark.parametrize("kind", UNCACHED, ids=lambda kind: kind.__name__)
def test_what_cannot_be_cached_says_why(kind: type) -> None:
    model = traps.made(kind)
    finding = found(model, traps.call_of())
    assert not finding.cached and finding.joined is (kind not in ALONE)
    with pytest.raises(AssertionError, match=UNCACHED[kind]):
        raise AssertionError(finding.reason)


@pytest.mark.parametrize("kind", [traps.BatchMean, traps.BatchNorm])
def test_rows_that_interact_go_alone(kind: type) -> None:
    model = traps.made(kind)
    finding = found(model, traps.call_of(rows=2))
    assert not finding.joined and "its rows interact" in finding.reason


@pytest.mark.parametrize("kind", [k for k in [*CACHED, *UNCACHED] if k not in ALONE], ids=lambda kind: kind.__name__)
def test_calls_joined_by_the_roles_found_equal_each_alone(kind: type) -> None:
    """Other calls than those of the proof, of more rows."""
    more = CACHED[kind][3] if kind in CACHED else {}
    model = traps.made(kind)
    spec = found(model, traps.call_of(**more)).spec
    calls = [traps.call_of(i, 2, **{n: torch.cat([v, v]) for n, v in more.items()}) for i in (7, 8)]
    together = model(**(calls[0] | {n: joined([call[n] for call in calls], 0) for n in spec.rows}))
    for i, call in enumerate(calls):
        assert_close(take_rows(together, slice(2 * i, 2 * i + 2)), model(**call))
    assert spec.shared == (("places",) if kind is traps.Positions else ())


def test_a_model_that_is_told_its_size_is_not_examined_at_every_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_OMNI_PROFILES", str(tmp_path))
    model = traps.made(traps.TakesWidth)
    calls = 0

    def call(given: dict[str, Any]) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return model(**given)

    denoiser = Denoiser(model)
    for width in range(64, 64 + 16 * SIZES_LIKE, 16):
        denoiser.learn(traps.call_of(width=width), call)
    examined = calls
    for width in range(512, 2048, 16):
        arguments = traps.call_of(width=width)
        assert denoiser.knows(arguments) and denoiser.stack_for(arguments) is not None
    assert examined == calls > 0
    assert not denoiser.knows(traps.call_of(width=7)), "one digit may choose, rather than measure"


def test_rows_of_a_named_tuple_keep_their_names() -> None:
    class Made(NamedTuple):
        sample: torch.Tensor
        extra: torch.Tensor | None

    taken = take_rows(Made(torch.arange(4.0), None), slice(1, 3))
    assert isinstance(taken, Made) and taken.sample.tolist() == [1.0, 2.0] and taken.extra is None


@pytest.mark.parametrize(
    ("kind", "name", "value"),
    [
        (traps.FirstHint, "hint", torch.ones(1, 3)),
        (traps.FirstHint, "hint", torch.zeros(1, 3)),
        (traps.FirstMask, "left_out", torch.zeros(1, 6, dtype=torch.bool)),  # another mask leaves out nothing, either
    ],
    ids=["a small hint", "no hint", "an empty mask"],
)
def test_what_was_not_seen_to_matter_must_be_equal(kind: type, name: str, value: torch.Tensor) -> None:
    """The first row's value served both calls of the proof, and that did not show; it would in other calls."""
    model = traps.made(kind)
    finding = found(model, traps.call_of(**{name: value}))
    assert finding.joined, finding.reason
    assert finding.spec.shared == (name,) and "when" in finding.spec.rows


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_numbers_of_few_digits_are_enough(dtype: torch.dtype) -> None:
    """Nothing right is refused for its roundings, and nothing wrong is taken for one."""
    for kind, cached, alone in [
        (traps.Plain, True, False),
        (traps.EarlyRead, False, False),
        (traps.BatchMean, True, True),
    ]:
        call = {name: value.to(dtype) for name, value in traps.call_of(rows=2).items()}
        finding = found(traps.made(kind).to(dtype), call)
        assert (finding.cached, finding.joined) == (cached, not alone), finding.reason


def test_a_block_that_an_argument_skips_is_another_kind_of_call() -> None:
    model = traps.made(traps.Skips)
    denoiser = Denoiser(model)
    calls = [traps.call_of(skip=skip) for skip in (None, 0, 2, traps.BLOCKS - 1)]
    assert len({signature_of(call) for call in calls}) == 4
    denoiser.learn(calls[0], lambda given: model(**given))
    assert denoiser.stack_for(calls[0]) is not None and denoiser.roles_for(calls[0]) is not None
    for call in calls[1:]:
        assert denoiser.stack_for(call) is None and denoiser.roles_for(call) is None  # until it is proven
        denoiser.learn(call, lambda given: model(**given))
        if (stack := denoiser.stack_for(call)) is None:
            continue
        plain, replaced = with_its_residual(model, stack, call, [])
        assert_close(replaced, plain)
    assert denoiser.stack_for(calls[2]) is not None  # one in the middle; without the first or last, nothing is noted
    assert denoiser.stack_for(calls[1]) is None and denoiser.stack_for(calls[3]) is None


def test_an_examination_leaves_no_trace() -> None:
    """Neither in the model, nor in the call's arguments, nor in the random generators."""
    for kind in (traps.BatchNorm, traps.Counts, traps.Remembers, traps.Noisy, traps.InPlace):
        model, arguments = traps.made(kind), traps.call_of(rows=2)
        modules = dict(model.named_modules())
        was = [value.clone() for value in (*model.buffers(), *model.parameters())]
        random = torch.get_rng_state()
        found(model, arguments)
        assert torch.equal(torch.get_rng_state(), random)
        assert all(map(torch.equal, (*model.buffers(), *model.parameters()), was))
        assert dict(model.named_modules()) == modules
        assert all(map(torch.equal, arguments.values(), traps.call_of(rows=2).values()))
        assert not vars(model).get("calls") and not vars(model).get("last")


def test_an_argument_that_cannot_be_looked_into_is_never_cached() -> None:
    class Store: ...

    model = traps.made(traps.Skips)
    finding = examine(model, lambda given: model(**given), traps.call_of(skip=Store()), None)
    assert not finding.cached and not finding.joined and "argument skip" in finding.reason


def test_latents_are_found_by_any_name() -> None:
    call = {"when": torch.rand(1), "ids": torch.ones(1, 9, 9, dtype=torch.long), "noisy": torch.rand(1, 2, 3)}
    assert latents_of(call) is call["noisy"]
    assert latents_of({"x": (many := [torch.rand(1, 2, 3, 4)]), "text": torch.rand(2, 8, 4)}) is many


@pytest.mark.slow
def test_a_module_in_a_wrapper_is_the_module_itself() -> None:
    class Wrapped(traps.Plain): ...

    model = traps.made(Wrapped)
    compiled = torch.compile(model, backend="eager")
    denoiser = Denoiser(compiled)
    arguments = traps.call_of()
    denoiser.learn(arguments, lambda given: compiled(**given))
    stack = denoiser.stack_for(arguments)
    assert denoiser.module is model and stack is not None and denoiser.roles_for(arguments) is not None
