"""benchmark.py --stage growth: exponents of made-up times are exact, what is expected of
a step follows from its counted operations, and the stage reports all of it.
"""

import json
import math

import pytest
import torch

import benchmark
from benchmarks import growth
from benchmarks.growth import TOLERANCE, Exponents, Growth, grow_codes, grow_images, grow_tokens
from benchmarks.training_steps import Workload
from run_state import Run, RunOptions
from runtime.device import choose_precision
from runtime.distributed import Launch

SIDES, CODES = (32, 48, 64), (64, 128, 512)


@pytest.fixture
def run(monkeypatch):
    monkeypatch.setattr(growth, "TIMES", (1, 2))
    monkeypatch.setattr(growth, "SIDES", SIDES)
    monkeypatch.setattr(growth, "CODES", CODES)
    cpu = torch.device("cpu")
    return Run(RunOptions(), Launch(), cpu, choose_precision("fp32", cpu))


def test_exponents_are_exact():
    cubes = Exponents.of([2, 4, 5], [8 * 7, 64 * 7, 125 * 7])
    assert (cubes.fitted, cubes.last) == pytest.approx((3, 3))
    bent = Exponents.of([1, 2, 4], [10, 20, 80])
    assert (bent.fitted, bent.last) == pytest.approx((1.5, 2))


def test_a_machine_that_slows_down_bends_no_curve():
    sizes = [1, 2, 4, 8]
    rounds = [[speed * size**2 for size in sizes] for speed in (1, 10, 3)]
    found = Growth.judge("time", sizes, rounds, sizes)
    assert (found.lowest, found.measured.fitted, found.highest) == pytest.approx((2, 2, 2))
    assert found.formula == Exponents(pytest.approx(1), pytest.approx(1)) and found.faster


@pytest.mark.parametrize(
    ("times", "faster"),
    [
        ([1, 2, 4], False),
        ([1, 1, 1], False),
        ([1, 2, 4 * 2 ** (0.9 * TOLERANCE)], False),
        ([1, 2, 4 * 2 ** (1.1 * TOLERANCE)], True),  # of the last two alone
        ([1, 3, 6], True),  # of the fit alone
    ],
)
def test_faster_than_the_formula_is_told(times, faster):
    assert Growth.judge("time", [1, 2, 4], [times], [5, 10, 20]).faster is faster
    lines = growth.format_growths("images", [Growth.judge("time", [1, 2, 4], [times], [5, 10, 20])])
    assert ("faster than its formula" in lines[1]) is faster


def test_the_median_is_of_the_rounds_exponents():
    found = Growth.judge("time", [1, 2], [[1, 2], [1, 4], [1, 16]], [1, 2])
    assert (found.lowest, found.measured.fitted, found.highest) == pytest.approx((1, 2, 4))


def test_what_is_expected_follows_from_counted_operations(run):
    """Of the classifier: 3 times the forward's products, less the gradient of the
    image. Of the quantizer: all features with all codes.
    """
    tokens = grow_tokens(Workload("demo", batch_size=2), run).contenders
    for side, contender in zip(SIDES, tokens, strict=True):
        b, n, c, depth = 2, (side // 16) ** 2, 128, 6
        t = n + 1
        block, head = 2 * b * t * 12 * c * c + 4 * b * t * t * c, 2 * b * c * 1000
        assert contender.flops == 3 * (depth * block + head) + 2 * 2 * b * n * 768 * c
        assert (contender.name, contender.images) == (f"{t} tokens", 2)
    codes = grow_codes(Workload("demo", batch_size=1), run).contenders
    assert [one.flops for one in codes] == [2 * 8 * 196 * count * 32 for count in CODES]
    images = grow_images(growth.vqkd, Workload("demo", batch_size=1), run).contenders
    assert images[1].flops == 2 * images[0].flops and images[1].images == 2


def test_memory_is_compared_without_what_is_kept(run):
    contest = grow_codes(Workload("demo", batch_size=1), run)
    rows = benchmark.hold(contest, rounds=1, warmup=1, matmul_flops=1e9)
    figures, _ = contest.conclude(rows)
    codebook = 4 * (3 * 32 + 2 - 32)  # bytes a code: weight, its average, two counts
    for row, held, count in zip(rows, figures["held_bytes"], CODES, strict=True):
        assert held == row.peak_bytes - codebook * count - 4
    time, cpu_time, memory = figures["growths"]
    assert [one["of"] for one in (time, cpu_time, memory)] == ["time", "CPU time", "memory"]
    assert (time["formula"]["fitted"], memory["formula"]["last"]) == pytest.approx((1, 1))
    assert memory["measured"]["fitted"] == pytest.approx(Exponents.of(CODES, figures["held_bytes"]).fitted)


def test_memory_of_tokens_is_that_of_the_formula(run, monkeypatch):
    """In bytes: what a step of 2 images holds at its peak."""
    monkeypatch.setattr(growth, "SIDES", (224, 256))
    contest = grow_tokens(Workload("demo", batch_size=2), run)
    for side, contender in zip(growth.SIDES, contest.contenders, strict=True):
        contender.turn({})  # there are moments
        tokens, kept = 1 + (side // 16) ** 2, contender.contender.keeps()
        numbers = tokens * (6 * (19 * 128 + 4 * tokens) + 2 * 4 * tokens)
        assert contender.peak({}) - kept == pytest.approx(2 * 4 * numbers, rel=0.1)


@pytest.mark.slow
def test_the_stage_reports_growth(tmp_path, run, capsys):
    output = tmp_path / "out.json"
    flags = "--device cpu --model demo --batch_size 2 --rounds 2 --warmup 1 --amp_dtype fp32".split()
    benchmark.main([*flags, "--stage", "growth", "--output", str(output)])
    contests = json.loads(output.read_text())["contests"]
    found = {contest["name"].split()[1]: contest for contest in contests}
    sizes = {name: contest["growth"]["sizes"] for name, contest in found.items()}
    tokens = [1 + (side // 16) ** 2 for side in SIDES]
    assert sizes == {
        "pretrain": [2, 4], "vqkd": [2, 4], "finetune": tokens, "quantizer": [*CODES], "demo": [1, 2],
    }  # fmt: skip
    for contest in contests:
        rows, (time, cpu_time, memory) = contest["rows"], contest["growth"]["growths"]
        assert cpu_time["of"] == "CPU time" and all(min(row["cpu_ms"]) > 0 for row in rows)
        assert all(len(row["step_ms"]) == 2 and row["peak_bytes"] > 0 for row in rows)
        ratio = [
            math.log(last / one) for one, last in zip(rows[0]["step_ms"], rows[-1]["step_ms"], strict=True)
        ]
        if len(rows) == 2:
            slopes = [value / math.log(2) for value in ratio]
            assert (time["lowest"], time["highest"]) == pytest.approx((min(slopes), max(slopes)))
            middle = pytest.approx(sum(slopes) / 2)
            assert time["measured"] == {"fitted": middle, "last": middle}
        assert memory["measured"]["last"] <= memory["formula"]["last"] + TOLERANCE  # bytes do not vary
    ranks = found["demo"]
    one, two = ranks["rows"]
    ours = next(growth.pretraining(Workload("demo", 2), run)).contenders[0].work
    buckets = sum(weight.nbytes for weight in ours.state.parameters)
    expected = ranks["growth"]["growths"][-1]["formula"]["last"]
    assert expected == pytest.approx(math.log2((one["peak_bytes"] + buckets) / one["peak_bytes"]))
    assert two["peak_bytes"] > one["peak_bytes"]
    speedups = [2 * alone / both for alone, both in zip(one["step_ms"], two["step_ms"], strict=True)]
    assert ranks["growth"]["speedups"] == pytest.approx(speedups)
    assert "2 ranks: " in capsys.readouterr().out
