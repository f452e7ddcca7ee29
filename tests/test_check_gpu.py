"""scripts/check_gpu.sh: without a GPU it says so; with tiny models it runs on a CPU; what
is wrong is found.
"""

import json
import math
import os
from types import SimpleNamespace

import pytest
import torch
from many_processes import end, start
from refusals import refused
from source_files import ROOT, load_script

from run_state import Run, RunOptions
from runtime import cards, distributed
from runtime.device import Precision

check_gpu = load_script("check_gpu")
gpu_report = load_script("gpu_report")
gpu_steps = load_script("gpu_steps")

RIGHT = {"losses": [9.0, 8.5], "grad_norms": [2.0, 3.0]}


def verdict(mode="bf16", stage="pretrain", expected=RIGHT, **changes):
    return gpu_report.compare_with_cpu({**RIGHT, **changes}, expected, mode, stage)


@pytest.mark.skipif(torch.cuda.is_available(), reason="is for machines without a GPU")
def test_without_a_gpu_it_is_one_sentence(capsys):
    assert "no GPU that this torch can use" in refused(check_gpu.main, [], capsys)


@pytest.mark.slow
def test_the_shell_command_passes_the_sentence_on(tmp_path):
    status, said = end(start(["bash", str(ROOT / "scripts/check_gpu.sh"), "--output", f"{tmp_path}/r.json"]))
    assert (status, said.count("\n")) == (2, 1), said
    assert not (tmp_path / "r.json").exists()


def test_every_test_of_cuda_is_marked():
    """So that `-m gpu` runs it."""
    asks = [
        path
        for path in (ROOT / "tests").glob("test_*.py")
        if "skipif(not torch.cuda.is_available()" in path.read_text() and path.name != "test_check_gpu.py"
    ]
    assert len(asks) >= 2
    for path in asks:
        text = path.read_text()
        assert text.count("skipif(not torch.cuda.is_available()") == text.count("@pytest.mark.gpu\n"), path


@pytest.mark.parametrize(
    ("mode", "changes", "ok"),
    [
        ("fp32", {"losses": [9.008, 8.5]}, True),
        ("fp32", {"losses": [9.0, 8.51]}, False),
        ("bf16", {"losses": [9.1, 8.4]}, True),
        ("bf16", {"losses": [9.0, 8.2]}, False),
        ("fp16", {"losses": [math.nan, 8.5]}, False),
        ("bf16", {"grad_norms": [1.7, 3.0]}, True),
        ("bf16", {"grad_norms": [1.5, 3.0]}, False),
        # fp16 skipped its first step: the second loss is of other weights
        ("fp16", {"losses": [9.0, 8.9], "grad_norms": [None, 3.0]}, True),
        ("fp16", {"losses": [9.9, 8.9], "grad_norms": [None, 3.0]}, False),
    ],
)
def test_which_results_are_near_enough(mode, changes, ok):
    assert verdict(mode, **changes)["ok"] is ok


def test_a_small_loss_is_compared_as_one_of_size_1():
    small = {"losses": [0.01, 0.01], "grad_norms": [1.0, 1.0]}
    assert verdict("fp32", expected=small, losses=[0.0105, 0.01], grad_norms=[1.0, 1.0])["ok"]


def test_the_probe_is_compared_by_its_losses_alone():
    assert verdict(stage="linear", grad_norms=[200.0, 3.0])["ok"]


def test_what_has_no_result_is_an_error():
    assert gpu_report.compare_with_cpu({"error": "it broke"}, RIGHT, "bf16", "vqkd") == {
        "ok": False,
        "error": "it broke",
    }
    assert not verdict(expected={"error": "x"})["ok"]


def test_one_stage_that_fails_does_not_hide_the_others(tmp_path, monkeypatch):
    def steps(stage, *_):
        if stage == "pretrain":
            raise SystemExit(2)
        return RIGHT

    monkeypatch.setattr(gpu_steps, "take_steps", steps)
    gpu_steps.main(["bf16", str(tmp_path), "--device", "cuda"])
    results = json.loads((tmp_path / "bf16.json").read_text())
    assert results.pop("pretrain") == {"error": "SystemExit: 2"}
    assert results == dict.fromkeys(["vqkd", "finetune", "segment", "linear"], RIGHT)


def test_one_rank_shards_as_under_torchrun():
    cpu = torch.device("cpu")
    with gpu_steps.shards_on_one_rank():
        launch = distributed.read_launch(dict(os.environ))
        assert (launch.launcher, launch.world_size) == ("torchrun", 1)
        assert [
            Run(RunOptions(fsdp=fsdp), launch, cpu, Precision("cpu", None)).is_sharded
            for fsdp in (True, False)
        ] == [
            True,
            False,
        ]


def card(monkeypatch, name, gigabytes, major):
    properties = SimpleNamespace(name=name, total_memory=gigabytes * 10**9)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (major, 0))


def test_a_card_without_bf16_is_checked_in_fp16(tmp_path, monkeypatch):
    card(monkeypatch, "Tesla V100-SXM2-32GB", 34, major=7)
    given = []
    monkeypatch.setattr(gpu_steps, "entry", lambda stage: given.append)
    monkeypatch.setattr(gpu_steps, "log_of", lambda folder: [])
    gpu_steps.take_steps("finetune", "compiled", tmp_path, "small", 8, "cuda")
    assert given[0][given[0].index("--amp_dtype") + 1] == "fp16"
    monkeypatch.setattr(check_gpu.Check, "call", lambda *_: "not run")
    modes = {row["mode"] for row in check_gpu.Check(tmp_path, "cuda", tiny=False).steps()}
    assert modes == gpu_steps.MODES.keys() - {"bf16"}


@pytest.mark.parametrize(
    ("name", "gigabytes", "known"),
    [
        ("Tesla V100-SXM2-32GB", 34, "V100-32GB"),
        ("NVIDIA A100-SXM4-40GB", 42, "A100-40GB"),
        ("NVIDIA H100 80GB HBM3", 85, "H100-80GB"),
        ("NVIDIA GeForce RTX 4090", 25, None),
        ("NVIDIA GeForce RTX 3090", 25, "RTX3090-24GB"),
        ("NVIDIA GeForce RTX 3090 Ti", 25, None),
    ],
)
def test_the_data_sheets_row_is_found(monkeypatch, name, gigabytes, known):
    rows = {
        name: SimpleNamespace(name=name, memory=int(name.split("-")[1][:-2]) * 2**30)
        for name in ("V100-16GB", "V100-32GB", "A100-40GB", "A100-80GB", "H100-80GB", "RTX3090-24GB")
    }
    monkeypatch.setattr(cards, "CARDS", rows)
    card(monkeypatch, name, gigabytes, major=8)
    found = check_gpu.find_card("cuda")
    assert (found and found.name) == known
    assert check_gpu.find_card("cpu") is None


def test_what_does_not_fit_into_the_time_is_named(tmp_path, monkeypatch):
    card(monkeypatch, "NVIDIA H100 80GB HBM3", 85, major=9)
    monkeypatch.setattr(check_gpu, "MINUTES", 0)
    check = check_gpu.Check(tmp_path, "cuda", tiny=False)
    assert "minutes were over" in check.benchmark()["error"]
    rows = [check.tests(), *check.steps(), *check.memory(128)]
    assert rows and all("minutes were over" in row["error"] for row in rows)


@pytest.mark.parametrize(("error", "status"), [(None, 0), ("not run: no time", 0), ("exit status 1: Oh", 1)])
def test_an_estimate_that_breaks_is_a_failure(error, status, tmp_path, monkeypatch, capsys):
    parts = {
        "tests": {"result": "2 passed", "error": None},
        "steps": [],
        "benchmark": {"batch_size": 2, "error": "", "contests": []},
        "memory": [{"stage": "vqkd", "peak_bytes": 1, "estimate_error": error}],
    }
    for name, found in parts.items():
        monkeypatch.setattr(check_gpu.Check, name, lambda *_, found=found, **__: found)
    assert check_gpu.main(["--device", "cpu", "--tiny", "--output", str(tmp_path / "r.json")]) == status
    assert (error or "peak memory") in capsys.readouterr().out


def test_a_part_that_takes_too_long_is_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(check_gpu, "CALL_MINUTES", 0.5 / 60)
    check = check_gpu.Check(tmp_path, "cuda", tiny=False)
    assert check.call("sleep", ["-c", "import time; time.sleep(60)"]) == "stopped after 0 s"
    monkeypatch.setattr(check_gpu, "CALL_MINUTES", 1)
    assert (
        check.call("end", ["-c", "print('last words'); raise SystemExit(3)"]) == "exit status 3: last words"
    )


def test_a_batch_that_does_not_fit_is_halved(tmp_path, monkeypatch):
    sizes = []

    def call(self, name, words):
        sizes.append(int(words[words.index("--batch_size") + 1]))
        return "exit status 1: torch.OutOfMemoryError: CUDA out of memory." if sizes[-1] > 32 else None

    monkeypatch.setattr(check_gpu.Check, "call", call)
    result = check_gpu.Check(tmp_path, "cuda", tiny=False).benchmark()
    assert (sizes, result["batch_size"], result["error"]) == ([128, 64, 32], 32, None)


def test_targets_and_table():
    def row(name, ratio):
        return {
            "name": name,
            "images_per_s": 1e3,
            "peak_bytes": 2**30,
            "ratio": ratio,
            "utilization": 0.6,
            "ms": {"step": 128.0},
        }

    contest = {"stage": "pretrain", "name": "pretrain x", "flops": 64e12, "absent": {"timm": "not installed"}}
    contest["rows"] = [row("ours", 1.0), row("plain", 1.9)]
    report = {
        "tests": {"result": "2 passed", "error": None},
        "steps": [
            {"stage": "vqkd", "mode": "bf16", **verdict()},
            {"stage": "linear", "mode": "fp16", **verdict(losses=[1, 1])},
        ],
        "benchmark": {"error": None, "batch_size": 128, "contests": [contest]},
        "compiled_benchmark": {"error": "not run: x"},
        "memory": [
            {"stage": "vqkd", "peak_bytes": 100 * 2**20, "estimated_bytes": 104 * 2**20},
            {"stage": "finetune", "error": "y"},
        ],
    }
    rows = gpu_report.compare_with_targets(report, peak_tflops=1000)
    assert [(row["value"], row["met"]) for row in rows] == [
        (pytest.approx(0.5), None),
        (1.9, False),
        (pytest.approx(0.04), True),
    ]
    assert len(gpu_report.compare_with_targets(report, peak_tflops=0)) == 2  # no MFU without the data sheet
    text = "\n".join(gpu_report.format_report({**report, "targets": rows}))
    for part in (
        "2 passed",
        "FAILED",
        "128 images",
        "not installed",
        "not run: x",
        "estimate.py 104",
        "missed",
        "y",
    ):
        assert part in text


@pytest.mark.slow
def test_all_of_it_on_a_cpu(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(check_gpu, "MINUTES", 60)
    monkeypatch.setattr(check_gpu, "CALL_MINUTES", 20)
    output = tmp_path / "report.json"
    status = check_gpu.main(["--device", "cpu", "--tiny", "--output", str(output)])
    said, report = capsys.readouterr().out, json.loads(output.read_text())
    assert (status, report["ok"]) == (0, True), said
    ran = {(row["stage"], row["mode"]) for row in report["steps"]}
    assert ran == {
        (stage, mode)
        for mode, (_, stages) in gpu_steps.MODES.items()
        if mode != "reference"
        for stage in stages
    }
    assert all(row["difference"] == 0 for row in report["steps"] if row["mode"] == "fp32")
    assert {contest["stage"] for contest in report["benchmark"]["contests"]} == {
        "pretrain",
        "vqkd",
        "finetune",
    }
    assert all(row["peak_bytes"] > 2**20 for row in report["memory"])
    assert report["targets"]
    assert "largest difference of a loss" in said
