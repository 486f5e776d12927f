"""`vllm-omni quality`: its figures equal an independent computation, and its files hold them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from closeness import assert_close, assert_differs
from PIL import Image

from vllm_omni import Omni
from vllm_omni import OmniDiffusionSamplingParams as Params
from vllm_omni.diffusion.cache.profile import shipped_profile
from vllm_omni.entrypoints.cli.main import main
from vllm_omni.envs import profile_folder
from vllm_omni.errors import InvalidValueError
from vllm_omni.quality import chart, jobs, report, sheet
from vllm_omni.quality.bench import Bench, BenchModel, Result
from vllm_omni.quality.meter import metered
from vllm_omni.quality.metrics import compare
from vllm_omni.quality.pairs import HELD_OUT_SEED, TUNING_SEED, Pair, held_out, own_captions, tuning
from vllm_omni.quality.peers import PEERS, private, tune
from vllm_omni.quality.rows import FEWER, GIVEN, PLANNED, RULE, Row, default_rows, fewer, reference, setting, tuned_rule

pytest.importorskip("torchmetrics")
STEPS = 8
PAIRS = held_out("demo", 2)


@pytest.fixture(scope="module")
def bench() -> Iterator[Bench]:
    made = Bench(BenchModel("demo", "float32"))
    yield made
    made.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("quality")


def run(folder: Path, capsys: pytest.CaptureFixture[str], *more: str) -> tuple[list[str], dict[str, Any]]:
    """The command's lines, and its report file."""
    asked = ["quality", "demo", "--pairs", "2", "--steps", str(STEPS), "--processes", "1", "--out", str(folder)]
    assert main([*asked, *more]) == 0
    return capsys.readouterr().out.splitlines(), json.loads((folder / "report.json").read_text())


SETTINGS = ("--settings", '{"nfe": 4}', "balanced")


def test_the_report_has_its_rows_and_files(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines, content = run(folder, capsys, *SETTINGS)
    summary = json.loads(lines[-1])
    rows = {row["name"]: row for row in content["results"]}
    assert set(rows) >= {"nfe=4", "balanced", "fewer steps: 4"}
    assert summary["rows"] == len(rows) and summary["pairs"] == 2
    assert rows["nfe=4"]["nfe"] == rows["fewer steps: 4"]["nfe"] == 4
    assert rows["nfe=4"]["times_ideal"] == STEPS / 4
    assert all(row["times_measured"] > 0 for row in rows.values())
    table = next(line for line in lines if " nfe=4 " in line)
    decibels = rows["nfe=4"]["pairs"]["psnr"]
    assert f"{np.mean(decibels):.2f}" in table and f"{min(decibels):.2f}" in table
    for file in summary["files"].values():
        assert Path(file).stat().st_size > 0
    assert any("LPIPS" in notice for notice in content["notices"]) != ("lpips" in rows["nfe=4"]["mean"])
    with Image.open(summary["files"]["chart"]) as picture:
        assert picture.width > 500 and len(picture.convert("L").getcolors(256) or []) > 10


def test_metrics_equal_an_independent_computation(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Pictures drawn solo by the plain pipeline and through an engine of its own; PSNR and SSIM in numpy."""
    _, content = run(folder, capsys, *SETTINGS)
    row = next(row for row in content["results"] if row["name"] == "nfe=4")
    with Omni("demo", dtype="float32") as omni:
        pipe = omni.engine.worker.pipeline
        for i, (prompt, seed) in enumerate(content["prompts_and_seeds"]):
            generator = torch.Generator("cpu").manual_seed(seed)
            plain = {"height": 64, "width": 64, "guidance_scale": 3.5, "max_sequence_length": 16}
            exact = pipe(prompt, num_inference_steps=STEPS, generator=generator, output_type="np", **plain).images[0]
            params = Params(num_inference_steps=STEPS, seed=seed, cache={"nfe": 4}, output_type="np")
            got = omni.generate(prompt, params, use_tqdm=False)[0].images[0]
            decibels = -10 * np.log10(np.mean((got.astype(np.float64) - exact) ** 2))
            assert row["pairs"]["psnr"][i] == pytest.approx(decibels, abs=0.05)
            assert row["pairs"]["ssim"][i] == pytest.approx(ssim(got, exact), abs=2e-3)


def ssim(a: np.ndarray, b: np.ndarray) -> float:
    """Wang et al. 2004: 11 x 11 Gaussian window of sigma 1.5, K1 0.01, K2 0.03; windows that fit, mean over all."""
    place = np.arange(11) - 5
    line = np.exp(-(place**2) / (2 * 1.5**2))
    window = np.outer(line, line) / line.sum() ** 2

    def blur(x: np.ndarray) -> np.ndarray:
        return np.einsum("hwcij,ij->hwc", np.lib.stride_tricks.sliding_window_view(x, (11, 11), (0, 1)), window)

    a, b = a.astype(np.float64), b.astype(np.float64)
    ma, mb = blur(a), blur(b)
    va, vb, cov = blur(a * a) - ma**2, blur(b * b) - mb**2, blur(a * b) - ma * mb
    c1, c2 = 0.01**2, 0.03**2
    return float(np.mean((2 * ma * mb + c1) * (2 * cov + c2) / ((ma**2 + mb**2 + c1) * (va + vb + c2))))


@pytest.mark.slow
def test_a_second_run_reuses_the_pictures(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, first = run(folder, capsys, *SETTINGS)
    before = {file: file.stat().st_mtime_ns for file in (folder / "work").iterdir()}
    _, content = run(folder, capsys, *SETTINGS, "--limit-minutes", "0")
    assert content["results"] == first["results"] and len(first["results"]) >= 3
    assert {file: file.stat().st_mtime_ns for file in (folder / "work").iterdir()} == before
    _, other = run(folder, capsys, *SETTINGS, "--seed", "7")
    assert other["prompts_and_seeds"][0][1] == 7
    assert len(list((folder / "work").iterdir())) > len(before), "other seeds are other pictures"


def test_what_a_new_calibration_changes_is_drawn_again(
    tmp_path: Path, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_OMNI_PROFILES", str(tmp_path / "profiles"))
    rows = reference(STEPS), setting(PLANNED, "half", STEPS, {"nfe": 4}), Row("MagCache", "MagCache", STEPS, peer="x")

    def files() -> list[Path]:
        worker = object.__new__(jobs.Worker)
        settings = jobs.ReportSettings(BenchModel("demo", "float32"), tuple(PAIRS), (STEPS,), tmp_path)
        vars(worker).update(plan=settings, identity="", engine_code="", profiles=bench.profiles)
        return [worker.file(row, "json") for row in rows]

    before = files()
    assert files() == before
    learnt = shipped_profile("demo").model_copy(update={"gains": None, "gain_errors": None})
    learnt.save(profile_folder() / "learnt.json")
    assert [one == other for one, other in zip(files(), before, strict=True)] == [True, False, False]


def test_the_time_limit_ends_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines, content = run(tmp_path, capsys, *SETTINGS, "--limit-minutes", "0")
    assert json.loads(lines[-1])["rows"] == 0
    assert any("nfe=4" in notice and "run again" in notice for notice in content["notices"])


@pytest.mark.slow
def test_two_processes_measure_the_same_as_one(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same figures as in one; a setting that cannot be had is one clear line from there, too."""
    _, alone = run(folder, capsys, *SETTINGS)
    lines, content = run(tmp_path, capsys, *SETTINGS, "--processes", "2")
    figures = [{row["name"]: row["pairs"] for row in report["results"]} for report in (alone, content)]
    assert figures[0].keys() == figures[1].keys() and json.loads(lines[-1])["rows"] == len(figures[0])
    for name, pairs in figures[0].items():
        assert figures[1][name]["psnr"] == pytest.approx(pairs["psnr"], abs=0.05)
    asked = ["--pairs", "1", "--steps", "8", "--processes", "1", "--settings", '{"nfe": 99}']
    assert main(["quality", "demo", "--out", str(tmp_path), *asked]) == 2
    assert "nfe must be between 2 and 8" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--settings", '{"speedupp": 2}'], "speedup"),
        (["--settings", "no-such-preset"], "--settings"),
        (["--settings", "{"], "must be JSON"),
        (["--pairs", "0"], "--pairs"),
        (["--steps", "1"], "--steps"),
        (["--prompts", "/no/such/file"], "--prompts"),
        (["--processes", "0"], "--processes"),
    ],
)
def test_bad_input_is_refused_with_the_option(
    more: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["quality", "demo", "--out", str(tmp_path), *more]) == 2
    error = capsys.readouterr().err
    assert words in error and len(error.splitlines()) == 1


def test_a_model_without_captions_needs_prompts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["quality", str(tmp_path), "--out", str(tmp_path)]) == 2
    assert "--prompts" in capsys.readouterr().err


def test_pairs_are_held_out() -> None:
    shown, kept = own_captions("demo", calibration=True), own_captions("demo", calibration=False)
    assert len(shown) == len(kept) == 100 and not set(shown) & set(kept)
    pairs = held_out("demo", 64)
    assert len(set(pairs)) == 64 and {pair.prompt for pair in pairs} <= set(kept)
    assert min(pair.seed for pair in pairs) >= HELD_OUT_SEED
    assert not {pair.seed for pair in pairs} & {pair.seed for pair in tuning(pairs, 4)}
    again = held_out("demo", 250)
    assert len(set(again)) == 250 and max(pair.seed for pair in again) < TUNING_SEED


# ----------------------------------------------------------------------------------------------------------- block work


def expected_work(bench: Bench) -> tuple[float, float]:
    """Multiply-adds of one full forward's blocks and of the first block alone, from shapes and token counts."""

    def block(module: torch.nn.Module) -> float:
        total = 0
        for name, layer in module.named_modules():
            if isinstance(layer, torch.nn.Linear):
                once = name.startswith("norm")  # modulation: of the conditioning vector, one per picture
                text = "context" in name or "add_" in name
                single = not hasattr(module, "ff_context")
                tokens = 1 if once else image + words if single else words if text else image
                total += layer.in_features * layer.out_features * tokens
        return float(total)

    image = (64 // bench.pipeline.vae_scale_factor // 2) ** 2
    words = int(bench.arguments["max_sequence_length"])
    transformer = bench.pipeline.transformer
    blocks = [*transformer.transformer_blocks, *transformer.single_transformer_blocks]
    return sum(map(block, blocks)), block(blocks[0])


def test_block_work_is_counted_as_it_runs(bench: Bench) -> None:
    full, _ = expected_work(bench)
    _, work = bench.draw(reference(STEPS), PAIRS)
    assert work.done == 2 * STEPS * full and work.full == 2 * STEPS
    _, work = bench.draw(setting("x", "x", STEPS, {"nfe": 3}), PAIRS)
    assert work.done == 2 * 3 * full and work.full == 2 * 3
    _, work = bench.draw(fewer(STEPS, 5), PAIRS)
    assert work.done == 2 * 5 * full and work.full == 2 * 5
    with metered(bench.pipeline) as work:
        pass
    assert work.done == 0 and not any(m._forward_hooks for m in bench.pipeline.transformer.modules()), "hooks stay"


def test_a_peer_is_charged_for_the_first_block_it_recomputes(bench: Bench) -> None:
    full, first = expected_work(bench)
    names = ["diffusers FirstBlockCache"]
    names += ["cache-dit DBCache"] if PEERS["cache-dit DBCache"].installed else []
    for name in names:
        _, work = bench.draw(Row(name, name, STEPS, peer=name, strength=1e9), PAIRS)
        computed = work.full / 2
        assert 1 <= computed < STEPS
        assert work.done == 2 * (computed * full + (STEPS - computed) * first), name


@pytest.mark.slow
@pytest.mark.parametrize("name", PEERS)
def test_peers_run_and_leave_the_pipeline_unchanged(name: str, bench: Bench) -> None:
    if not PEERS[name].installed:
        pytest.skip(f"{PEERS[name].package} is not installed")
    before = bench._plain(bench.pipeline, STEPS, PAIRS[:1])
    strong = PEERS[name].strengths[-1]
    pictures, work = bench.draw(Row(name, name, STEPS, peer=name, strength=strong), PAIRS)
    again, _ = bench.draw(Row(name, name, STEPS, peer=name, strength=strong), PAIRS[1:])
    assert_close(np.float32(pictures[1:]), again, "nothing is left over from the picture before")
    assert 1 <= work.full / 2 < STEPS
    assert_differs(np.float32(pictures[:1]), before, "it does something")
    np.testing.assert_array_equal(bench._plain(bench.pipeline, STEPS, PAIRS[:1]), before)


def test_a_private_copy_shares_the_weights(bench: Bench) -> None:
    own = private(bench.pipeline)
    pairs = zip(own.transformer.parameters(), bench.pipeline.transformer.parameters(), strict=True)
    assert all(a is b for a, b in pairs)
    assert own.transformer is not bench.pipeline.transformer and type(own) is not type(bench.pipeline)


def test_tuning_finds_the_nearest_strength() -> None:
    asked: list[float] = []

    def speedup(strength: float) -> float:
        asked.append(strength)
        return 1 + strength

    strengths = tuple(i / 10 for i in range(40))
    assert tune(speedup, strengths, (1.52, 2.0, 3.04, 99.0)) == [0.5, 1.0, 2.0, 3.9]
    assert len(asked) == len(set(asked)) < 20


# -------------------------------------------------------------------------------------------------- margins and choices


def result(group: str, nfe: float, work: float, decibels: list[float], steps: int = 28, **row: Any) -> Result:
    made = setting(group, f"{group} {nfe}", steps, row.pop("cache", "off"))
    made = Row(**vars(made) | row)
    return Result(made, nfe, work, {"psnr": decibels}, 0.0)


def test_margins_are_interpolated_between_rows() -> None:
    peer = "cache-dit DBCache+Taylor"
    rows = [
        result(PLANNED, 14, 14.0, [60.0, 62.0]),
        result(f"{PLANNED}, gram", 14, 14.0, [63.0, 65.0]),
        result(PLANNED, 7, 7.0, [50.0, 52.0]),
        result(FEWER, 14, 14.0, [50.0, 52.0]),
        result(RULE, 14, 14.0, [56.0, 58.0]),
        result(peer, 12, 28.0 / 2**0.5, [70.0, 70.0], peer=peer),
        result(peer, 8, 28.0 / 2**1.5, [60.0, 60.0], peer=peer),
    ]
    found = {(m.times, m.over): m for m in report.margins(rows)}
    assert found[2.0, FEWER].margin_db == pytest.approx(13.0) and found[2.0, FEWER].ours == f"{PLANNED}, gram 14"
    assert found[2.0, RULE].margin_db == pytest.approx(7.0) and not found[2.0, RULE].reached
    assert found[2.0, peer].over_db == pytest.approx(65.0), "half-way in log work"
    assert found[4.0, peer].over_db == pytest.approx(60.0), "its fastest point, which had more work"
    peers = [r for r in rows if r.row.peer]
    assert report.interpolate(peers, 25.0) is None
    slope = 10 / np.log(2)  # dB by log work, between its two points
    assert report.interpolate(peers, 28.0 / 2**0.5 * 1.04) == pytest.approx(70.0 + slope * np.log(1.04))
    assert [(m.times, m.over) for m in report.best_peers(report.margins(rows))] == [(2.0, peer), (4.0, peer)]


def test_the_sheet_shows_each_given_setting_beside_as_much_work() -> None:
    fewer_steps = [result(FEWER, n, float(n), [40.0]) for n in (14, 9, 7, 5)]
    ours = [result(PLANNED, n, float(n), [50.0]) for n in (14, 7)]
    given = [result(GIVEN, n, float(n), [50.0]) for n in (5, 14)]
    assert [r.row.name for r in sheet.chosen([*fewer_steps, *given], 28)] == [
        "given 5", "given 14", "fewer steps 5", "fewer steps 14",
    ]  # fmt: skip
    assert [r.row.name for r in sheet.chosen([*fewer_steps, *ours], 28)] == ["fewer steps 7", "planned 7"]


def test_default_preset_is_the_largest_with_30_db_at_worst_that_beats_fewer_steps() -> None:
    def planned(steps: int, promise: float, decibels: list[float]) -> Result:
        return result(PLANNED, steps / promise, steps / promise, decibels, steps, cache={"speedup": promise})

    rows = [planned(28, 2.0, [60, 40]), planned(28, 3.0, [50, 31]), planned(28, 4.0, [50, 29.9])]
    rows += [planned(50, 2.0, [60, 40]), planned(50, 3.0, [50, 30.5]), planned(50, 4.0, [50, 40])]
    chosen = report.default_preset(rows)
    assert chosen is not None and chosen["speedup"] == 3.0 and chosen["worst_db"] == {28: 31, 50: 30.5}
    assert report.default_preset(rows[2:3]) is None
    at_nine = result(FEWER, 9.0, 9.0, [45, 45], 28)
    assert report.default_preset([*rows, at_nine]) is not None, "40.5 dB on average are below 45"
    assert report.default_preset([*rows, at_nine])["speedup"] == 2.0  # type: ignore[index]
    at_nine.metrics["psnr"] = [40, 40]
    assert report.default_preset([*rows, at_nine]) == chosen


@pytest.mark.slow
def test_the_rule_is_tuned_to_a_number_of_forwards(bench: Bench) -> None:
    ratios = bench.ratios(28)
    for forwards in (19, 14, 9, 7):
        rule = tuned_rule(ratios, forwards)
        assert rule is not None
        row = setting(RULE, "x", 28, rule | {"predictor": "reuse"})
        _, work = bench.draw(row, PAIRS[:1])
        assert work.full == forwards
    assert len({row.name for row in default_rows(28, ratios)}) == len(set(default_rows(28, ratios)))


def test_identical_pictures_and_videos_have_no_error() -> None:
    pictures = np.random.default_rng(0).random((2, 3, 16, 16, 3)).astype(np.float32)
    assert compare(pictures, pictures)["psnr"] == [100.0, 100.0]
    worse = np.clip(pictures + 0.1, 0, 1)
    assert all(0 < s < 1 for s in compare(worse, pictures)["ssim"])


def test_the_sheet_shows_amplified_differences(tmp_path: Path) -> None:
    exact = np.full((2, 32, 32, 3), 0.5, dtype=np.float16)
    np.save(tmp_path / "exact.npy", exact)
    np.save(tmp_path / "got.npy", exact + np.float16(0.0625))
    made = result(PLANNED, 7, 7.0, [24.0, 24.0])
    made.sheet = str(tmp_path / "got.npy")
    sheet.draw([made], tmp_path / "exact.npy", tmp_path / "sheet.png")
    with Image.open(tmp_path / "sheet.png") as picture:
        column = sheet.LEFT + sheet.SIDE // 2
        rows = [sheet.GAP + i * (sheet.SIDE + sheet.GAP) + sheet.SIDE // 2 for i in range(3)]
        assert [picture.getpixel((column, row)) for row in rows] == [(128,) * 3, (143,) * 3, (128,) * 3]


def test_the_chart_has_both_step_counts(tmp_path: Path) -> None:
    rows = [result(PLANNED, n, n, [90.0 - n, 80.0 - n], steps) for steps in (28, 50) for n in (5, 7, 14)]
    rows += [result(FEWER, n, n, [50.0 + n, 45.0], steps) for steps in (28, 50) for n in (5, 7, 14)]
    chart.draw(rows, tmp_path / "chart.png", "title")
    with Image.open(tmp_path / "chart.png") as picture:
        assert picture.width > picture.height


def test_a_count_of_pairs_below_one_is_refused() -> None:
    with pytest.raises(InvalidValueError, match="--pairs"):
        held_out("demo", 0)
    assert held_out("demo", 1) == [Pair(own_captions("demo", calibration=False)[0], HELD_OUT_SEED)]
