"""When a run is slow: the MFU, --profile and --memory_snapshot. None of them changes
what is trained.
"""

import gzip
import json
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from many_processes import two_processes
from refusals import refused
from source_files import ROOT
from tiny_runs import as_flags, assert_same_weights, finetuning_flags
from tiny_stages import STAGES, all_stages, metrics

import engine
import estimate
import run_class_finetuning
from estimation.measurement import pretended_run
from monitoring.profiling import StepProfiler, format_summary
from runtime import compilation, flops, phases
from runtime.cards import CARDS, has_peak_of_its_row, recognize
from runtime.device import Precision
from runtime.flops import FlopCounter, StepFlops
from runtime.phases import PHASES, PhaseRecorder, phase
from runtime.terminal import silence

CPU = torch.device("cpu")
FP32 = Precision("cpu", None)


@pytest.fixture
def counted(monkeypatch):
    """FLOPs of a step of each run that ends."""
    found, fit = [], engine.Trainer.fit

    def noted(trainer):
        fit(trainer)
        found.append(trainer.flops.per_step)

    monkeypatch.setattr(engine.Trainer, "fit", noted)
    return found


@pytest.fixture(scope="module")
def stages(data, tokenizer_weight, tmp_path_factory):
    return all_stages(data, tokenizer_weight, tmp_path_factory.mktemp("stages"))


# ── FLOPs of a step ──

ESTIMATED = {
    "vqkd": "run_vqkd_training.py",
    "pretraining": "run_beitv2_pretraining.py",
    "finetuning": "run_class_finetuning.py",
    "segmentation": "run_segmentation_finetuning.py",
}


@pytest.mark.parametrize("more", ["", "--amp_dtype bf16", "--update_freq 2", "--grad_checkpointing"])
@pytest.mark.parametrize("stage", ESTIMATED)
def test_a_step_has_the_flops_of_its_estimate(stage, more, stages, counted, tmp_path):
    """The estimate, which knows the same operations from tensors without data, counts
    what is computed again as well.
    """
    main, flags = stages[stage]
    words = [*flags(tmp_path, *more.split()), *(["--nb_classes", "2"] if stage == "finetuning" else [])]
    words += ["--max_steps", "3"] if stage == "segmentation" else ["--epochs", "1"]
    main(words)
    entry = estimate.ENTRIES[ESTIMATED[stage]]
    plain = [word for word in words if word != "--grad_checkpointing"]
    with silence(), pretended_run(entry, entry.parse(plain), 16, CARDS["A100-80GB"], 1) as run:
        assert counted == [run.measure().flops]


@pytest.mark.parametrize("stage", STAGES)
def test_counting_and_profiling_change_no_weight(stage, stages, tmp_path, monkeypatch):
    """Nor any random state, codebook or running statistic of the run."""
    main, flags = stages[stage]
    main(flags(tmp_path / "with", "--profile", "2"))
    monkeypatch.setattr(flops, "STEPS_TO_COUNT", 0)
    main(flags(tmp_path / "without"))
    assert_same_weights(*(tmp_path / name / "checkpoint.pth" for name in ("with", "without")))
    figures = [[line["mfu"] for line in metrics(tmp_path / name)] for name in ("with", "without")]
    assert all(0 < mfu < 2 for mfu in figures[0])
    assert set(figures[1]) == {None}
    seconds = {line.split("  ")[0]: line for line in summary_rows(tmp_path / "with")}
    assert seconds.keys() == set(PHASES)


@pytest.mark.parametrize("more", [[], ["--fsdp"]], ids=["ddp", "fsdp"])
def test_two_processes_are_counted_and_profiled_as_one(more, data, tmp_path):
    """Rank 0 does it alone."""
    script = tmp_path / "uncounted.py"
    script.write_text(
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "import run_class_finetuning\nfrom runtime import flops\n"
        "flops.STEPS_TO_COUNT = 0\nrun_class_finetuning.main()\n"
    )
    common = [*as_flags(epochs=1, batch_size=2, mixup=0.8, drop_path=0.1), *more]
    profiled = finetuning_flags(data, tmp_path / "with", *common, "--profile", "2")
    two_processes("run_class_finetuning.py", profiled)
    two_processes(str(script), finetuning_flags(data, tmp_path / "without", *common))
    assert_same_weights(*(tmp_path / name / "checkpoint.pth" for name in ("with", "without")))
    assert metrics(tmp_path / "with")[-1]["mfu"] > 0
    assert "profile    2 steps" in (tmp_path / "with/profile/summary.txt").read_text()


@pytest.mark.parametrize("stage", ["pretraining", "finetuning", "segmentation", "vqkd"])
def test_a_compiled_step_is_counted_and_stays_compiled(stage, stages, counted, tmp_path, monkeypatch):
    """From a forward pass beside it; --mixup changes its batch."""
    monkeypatch.setattr(compilation, "BACKEND", "aot_eager")
    torch._dynamo.reset()
    main, flags = stages[stage]
    more = ["--mixup", "0.8"] if stage == "finetuning" else []
    main(flags(tmp_path / "plain", *more))
    main(flags(tmp_path / "with", *more, "--compile"))
    monkeypatch.setattr(flops, "STEPS_TO_COUNT", 0)
    main(flags(tmp_path / "without", *more, "--compile"))
    assert_same_weights(*(tmp_path / name / "checkpoint.pth" for name in ("with", "without")))
    plain, compiled, nothing = counted
    assert compiled == pytest.approx(plain, rel=1e-3)  # its quantizer searches no code before k-means
    assert nothing is None


def test_a_rehearsal_leaves_modes_and_statistics_as_they_are():
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4), torch.nn.Dropout(0.5))
    model[2].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    counted = StepFlops(True)
    counted.rehearse(model, lambda: model(torch.ones(2, 4)), 3)
    assert counted.per_step == 3 * 2 * (2 * 2 * 4 * 4)  # three of: forward, gradient of the weight
    assert [module.training for module in model] == [True, True, False]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_pass_that_is_computed_again_does_not_count():
    x = torch.ones(2, 4, requires_grad=True)
    layer = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.GELU(), torch.nn.Linear(4, 4))
    found = []
    for again in (False, True):
        with FlopCounter() as counter:
            out = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False) if again else layer(x)
            out.sum().backward()
        found.append(counter.flops)
    assert found == [2 * 3 * 2 * 2 * 4 * 4] * 2


def test_frozen_networks_count_once():
    frozen, layer = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)
    with FlopCounter(with_backward=True) as counter:
        with torch.no_grad():
            features = frozen(torch.ones(1, 4))
        layer(features)
    assert counter.flops == (1 + 2) * 2 * 4 * 4


# ── The peak ──


def test_the_mfu_is_of_the_stated_peak(stages, counted, tmp_path, capsys):
    main, flags = stages["finetuning"]
    main(flags(tmp_path, *as_flags(peak_tflops=0.5, print_freq=2)))
    for line in metrics(tmp_path):
        assert line["mfu"] == pytest.approx(counted[0] * line["images_per_second"] / 4 / 0.5e12)
    said = capsys.readouterr().out
    assert said.count("peak       0.5 TFLOP/s in fp32, stated") == 1
    assert "mfu " in said


@pytest.mark.parametrize(
    ("name", "gib", "card"),
    [
        ("Tesla V100-SXM2-16GB", 16, "V100-16GB"),
        ("Tesla V100-SXM2-32GB", 32, "V100-32GB"),
        ("Tesla T4", 15, "T4-16GB"),
        ("NVIDIA A10", 22, "A10-24GB"),
        ("NVIDIA GeForce RTX 3090", 24, "RTX3090-24GB"),
        ("NVIDIA GeForce RTX 4090", 24, "RTX4090-24GB"),
        ("NVIDIA L40S", 45, "L40S-48GB"),
        ("NVIDIA A100-PCIE-40GB", 40, "A100-40GB"),
        ("NVIDIA A100 80GB PCIe", 80, "A100-80GB"),
        ("NVIDIA H100 80GB HBM3", 80, "H100-80GB"),
        ("NVIDIA H200", 140, "H200-141GB"),
    ],
)
def test_gpus_are_recognized(name, gib, card):
    assert recognize(name, gib * 2**30) is CARDS[card]
    assert has_peak_of_its_row(name)


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA H100 PCIe",
        "NVIDIA H100 NVL",
        "Tesla V100-PCIE-16GB",
        "NVIDIA GeForce RTX 3090 Ti",
        "NVIDIA A10G",
        "NVIDIA A100-SXM4-40GB MIG 1g.5gb",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 4090 D",
    ],
)
def test_other_products_of_a_name_have_no_known_peak(name, monkeypatch, caplog):
    gpu = SimpleNamespace(name=name, total_memory=40 * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: gpu)
    with caplog.at_level("INFO", "beit"):
        monkeypatch.setattr(flops.log, "propagate", True)
        assert flops.find_peak(torch.device("cuda", 0), Precision("cuda", torch.float16), None) is None
    assert f"{name} not known: for the MFU give --peak_tflops" in caplog.text
    assert flops.find_peak(torch.device("cuda", 0), Precision("cuda", torch.float16), 3.0) == 3e12


def test_a_gpu_has_the_peak_of_its_dtype(monkeypatch):
    gpu = SimpleNamespace(name="Tesla V100-SXM2-16GB", total_memory=16 * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: gpu)
    peaks = [
        flops.find_peak(torch.device("cuda", 0), Precision("cuda", dtype), None)
        for dtype in (torch.float16, None)
    ]
    assert peaks == [125e12, 15.7e12]


def test_the_cpu_is_measured_without_a_random_number():
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    flops.measure_peak.cache_clear()
    assert 1e9 < flops.find_peak(CPU, FP32, None) < 1e14
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert np.array_equal(np.random.get_state()[1], states[2])


# ── --profile ──


def summary_rows(out):
    return [line.strip() for line in (out / "profile/summary.txt").read_text().splitlines()[1:]]


def test_a_profile_has_a_trace_and_a_table_and_the_run_goes_on(stages, tmp_path, capsys):
    main, flags = stages["pretraining"]
    main(flags(tmp_path, *as_flags(profile=3, update_freq=2, batch_size=2)))
    said = capsys.readouterr().out
    assert (tmp_path / "profile/summary.txt").read_text() in said.replace("\r", "")
    assert "the run goes on" in said
    assert "finished epoch 2" in said
    with gzip.open(tmp_path / "profile/trace.json.gz", "rt") as file:
        events = json.load(file)["traceEvents"]
    count = {name: sum(event.get("name") == name and event.get("ph") == "X" for event in events)
             for name in PHASES[:-1]}  # fmt: skip
    assert count == {
        "data wait": 3,
        "copy": 6,
        "frozen networks": 6,
        "forward": 6,
        "backward": 6,
        "optimizer": 3,
    }
    assert any(event.get("name") == "aten::addmm" for event in events)
    shares = [float(row.split()[-1].rstrip("%")) for row in summary_rows(tmp_path)]
    assert sum(shares) == pytest.approx(100, abs=0.5)
    assert phases.recorder is None


@pytest.mark.parametrize(("profile", "says"), [(20, "6 steps of 20: the run ended"), (6, "6 steps, ")])
def test_a_run_that_ends_earlier_shows_what_there_is(profile, says, stages, tmp_path, capsys):
    main, flags = stages["finetuning"]
    main(flags(tmp_path, *as_flags(profile=profile)))
    assert says in (tmp_path / "profile/summary.txt").read_text()
    assert ("the run goes on" in capsys.readouterr().out) == (profile == 6)
    assert (tmp_path / "profile/trace.json.gz").exists()


def test_a_run_of_two_steps_says_that_nothing_was_profiled(stages, tmp_path, capsys):
    main, flags = stages["finetuning"]
    main(flags(tmp_path, *as_flags(profile=3, batch_size=16)))
    assert "nothing was profiled: the run ended within its first 2 steps" in capsys.readouterr().out
    assert list((tmp_path / "profile").iterdir()) == []


def test_writing_a_profile_is_no_part_of_the_speed(stages, tmp_path, monkeypatch):
    end_step = StepProfiler.end_step
    monkeypatch.setattr(StepProfiler, "end_step", lambda self: end_step(self) + 1000)
    main, flags = stages["finetuning"]
    main(flags(tmp_path, *as_flags(print_freq=1)))
    assert all(line["images_per_second"] > 1e6 for line in metrics(tmp_path))  # of no time at all


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (as_flags(profile=3, output_dir=""), "--profile writes to a folder in --output_dir: name one"),
        (["--memory_snapshot"], "--memory_snapshot records the memory of a GPU, and this run is on the CPU"),
        (as_flags(profile=-1), "--profile"),
        (as_flags(peak_tflops=0), "--peak_tflops"),
    ],
)
def test_what_cannot_be_recorded_is_refused(words, says, data, tmp_path, capsys):
    assert says in refused(run_class_finetuning.main, [*finetuning_flags(data, tmp_path), *words], capsys)


def test_an_inner_phase_interrupts_the_outer_one(monkeypatch):
    now = iter([0.0, 1.0, 3.0, 7.0, 15.0, 31.0])
    monkeypatch.setattr(phases.time, "perf_counter", lambda: next(now))
    recorder = PhaseRecorder(CPU)
    recorder.start()
    with phase(phases.FORWARD), phase(phases.FROZEN):
        pass
    seconds = recorder.stop()
    assert {name: value for name, value in seconds.items() if value} == {
        "other": 1.0 + 16.0, "forward": 2.0 + 8.0, "frozen networks": 4.0
    }  # fmt: skip
    assert "frozen networks     2.0000 s   12.9%" in format_summary(seconds, 2, 2)[3]


def test_on_a_gpu_phases_are_timed_by_its_events(monkeypatch):
    """In its stream, in milliseconds, and read once the device has got there."""
    now, waited = iter([0.0, 2.0, 6.0, 7.0]), []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self, stream):
            self.at = next(now)

        def elapsed_time(self, later):
            assert waited
            return 1000 * (later.at - self.at)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "stream")
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    recorder = PhaseRecorder(torch.device("cuda", 0))
    recorder.start()
    with phase(phases.BACKWARD):
        pass
    seconds = recorder.stop()
    assert {name: value for name, value in seconds.items() if value} == {"other": 3.0, "backward": 4.0}


def test_phases_are_nothing_unless_they_are_recorded():
    assert phase(phases.FORWARD) is phase(phases.COPY) is phases.NOTHING


# ── --memory_snapshot ──


@pytest.mark.parametrize(("profile", "at"), [(0, 3), (4, 6)])
def test_a_snapshot_of_memory_is_written_once(profile, at, tmp_path, monkeypatch):
    calls = []
    memory = SimpleNamespace(
        _record_memory_history=lambda **how: calls.append(("record", how.get("enabled", "all"))),
        _dump_snapshot=lambda path: calls.append(("dump", path)),
    )
    monkeypatch.setattr(torch.cuda, "memory", memory)
    profiler = StepProfiler(tmp_path, profile, True, CPU)
    for step in range(1, 10):
        profiler.end_step()
        assert len(calls) == (1 if step < at else 3)
    profiler.close()
    path = str(tmp_path / "profile/memory.pickle")
    assert calls == [("record", "all"), ("dump", path), ("record", None)]


def test_what_led_to_a_lack_of_memory_is_in_the_snapshot(tmp_path, monkeypatch):
    calls = []
    memory = SimpleNamespace(
        _record_memory_history=lambda **how: None, _dump_snapshot=lambda path: calls.append(path)
    )
    monkeypatch.setattr(torch.cuda, "memory", memory)
    StepProfiler(tmp_path, 0, True, CPU).close()
    assert calls == [str(tmp_path / "profile/memory.pickle")]
