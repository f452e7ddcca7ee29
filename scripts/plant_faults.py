"""Plant faults that only a GPU would show, one at a time in a copy of this folder, and
see whether tests/test_cuda_on_paper.py finds them.

    python scripts/plant_faults.py [--only 3 7 ...] [--jobs 1] [--cpu] [--markdown F]

First the tests must pass without a fault. Then each fault replaces one piece of one
file, and is found if a test fails. Prints a line for each and `found N of M`; exit code
0: at most one was missed. --cpu: also run the seeded training runs on the CPU
(tests/test_entries.py) with each fault, which shows that they do not see it.
--markdown: the table of docs/lab/cuda.md, into a file. Above 300 lines: most of them are
the table of faults.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import arguments  # noqa: E402

ON_PAPER = ["tests/test_cuda_on_paper.py"]
ON_THE_CPU = ["tests/test_entries.py", "-k", "seeded_loss_curves"]


class Fault(NamedTuple):
    what: str
    file: str
    right: str  # stands in the file once
    wrong: str


FAULTS = [
    Fault(
        "the masked positions stay on the host",
        "layers/token_subset.py",
        "listed.flatten().to(device, non_blocking=True)",
        "listed.flatten().cpu()",
    ),
    Fault(
        "the positions are listed in the step, not by the loader",
        "data_pipeline/files.py",
        'if "mask" in batch else {}',
        'if "patch_mask" in batch else {}',
    ),
    Fault(
        "labels stay on the host",
        "runtime/device.py",
        'keep_on_host: Collection[str] = ("mask",)',
        'keep_on_host: Collection[str] = ("mask", "label")',
    ),
    Fault(
        "batches are copied without non_blocking",
        "runtime/device.py",
        "value.to(device, non_blocking=True)",
        "value.to(device)",
    ),
    Fault(
        "the step does not wait for the stream that copies",
        "runtime/device.py",
        "    computing.wait_stream(copying)\n",
        "",
    ),
    Fault(
        "copied memory may be used again too early (no record_stream)",
        "runtime/device.py",
        "value.record_stream(computing)",
        "value.shape",
    ),
    Fault(
        "training batches are not pinned",
        "run_state.py",
        'options.pin_mem and run.device.type == "cuda"',
        "False",
    ),
    Fault(
        "batches of an evaluation are not pinned",
        "data_pipeline/samplers.py",
        'settings.pin_mem and device.type == "cuda"',
        "False",
    ),
    Fault(
        "an .item() asks whether the loss is finite",
        "engine.py",
        'is_finite = torch.where(torch.isfinite(loss.detach()), 1.0, float("nan"))',
        'is_finite = 1.0 if torch.isfinite(loss.detach()).item() else float("nan")',
    ),
    Fault(
        "clipping compares the norm on the host",
        "engine.py",
        "((norm + 1e-6) / clip_grad).clamp(min=1) if clip_grad else None",
        "(norm + 1e-6) / clip_grad if clip_grad and norm > clip_grad else None",
    ),
    Fault(
        "the log reads every value",
        "runtime/metrics.py",
        "row = torch.stack([value.detach().float() for value in values.values()])",
        "row = torch.tensor([float(value.detach()) for value in values.values()])",
    ),
    Fault(
        "the list of skipped steps reads every flag",
        "runtime/skipped_steps.py",
        "~torch.isfinite(value)))",
        "torch.tensor(not torch.isfinite(value))))",
    ),
    Fault(
        "the index of the bias table is no buffer",
        "layers/rel_pos_bias.py",
        'module.register_buffer("relative_position_index", relative_position_index(grid))',
        "module.relative_position_index = relative_position_index(grid)",
    ),
    Fault(
        "positions of another grid stay on the CPU",
        "vit_backbone.py",
        "relative_position_index(grid, x.device)",
        "relative_position_index(grid)",
    ),
    Fault(
        "the tokenizer's mean is no buffer",
        "modeling_vqkd.py",
        'self.register_buffer("input_mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)',
        "self.input_mean = torch.tensor(mean).view(1, -1, 1, 1)",
    ),
    Fault(
        "targets are counted on the CPU",
        "engine_for_pretraining.py",
        "self.code_counts = torch.zeros(n_codes, device=device)",
        "self.code_counts = torch.zeros(n_codes)",
    ),
    Fault(
        "the gradients of the logits start from a tensor on the CPU",
        "layers/linear_cross_entropy.py",
        "probs.new_full(label.shape, -1.0)",
        "-__import__('torch').ones(label.shape)",
    ),
    Fault(
        "the quantizer asks the device whether it is ready",
        "norm_ema_quantizer.py",
        "if not self.ready or (self.training and self.warming_up):",
        "if not self.embedding.initted or (self.training and self.warming_up):",
    ),
    Fault(
        "the quantizer reads whether the sums are finite",
        "norm_ema_quantizer.py",
        "sound = torch.isfinite(sums.sum())",
        "sound = torch.full_like(used[0], bool(torch.isfinite(sums.sum())))",
    ),
    Fault(
        "the jitter asks for the flips",
        "data_pipeline/augmentation.py",
        "x = torch.where(hflip[:, 0] > 0, x.flip(-1), x)",
        "x = torch.where(hflip[:, 0] > 0, x.flip(-1), x) if hflip.any() else x",
    ),
    Fault(
        "the divisor of pixels is copied in each step",
        "data_pipeline/crops.py",
        "@functools.cache\ndef per_channel",
        "def per_channel",
    ),
    Fault("the moving average stays on the CPU", "run_state.py", "else [model, ema.module]", "else [model]"),
    Fault(
        "class weights stay on the CPU",
        "engine_for_finetuning.py",
        "None if class_weights is None else class_weights.to(device)",
        "None if class_weights is None else class_weights.cpu()",
    ),
    Fault(
        "the statistics of the linear heads are no buffers",
        "engine_for_linear_eval.py",
        'self.register_buffer("std", torch.ones(layers, dim))',
        "self.std = torch.ones(layers, dim)",
    ),
    Fault(
        "pixels are counted on the CPU",
        "engine_for_segmentation.py",
        "dtype=torch.int64, device=self.device)",
        "dtype=torch.int64)",
    ),
    Fault(
        "a checkpoint keeps tensors of the device",
        "checkpoint_io/checkpoints.py",
        'whole.to("cpu", copy=True)',
        "whole.clone()",
    ),
    Fault(
        "the bank of k-NN stays in main memory",
        "evaluation/knn.py",
        "F.normalize(bank, dim=-1).to(device), train.labels.to(device)",
        "F.normalize(bank, dim=-1), train.labels",
    ),
    Fault(
        "autocast is the CPU's",
        "runtime/device.py",
        "torch.autocast(self.device_type, self.dtype)",
        'torch.autocast("cpu", self.dtype)',
    ),
    Fault(
        "the loss scale of fp16 is read in each step",
        "engine.py",
        "    scaler.update()\n",
        "    scaler.update()\n    scaler.get_scale()\n",
    ),
    Fault(
        "the device's generator is not seeded",
        "engine.py",
        '"step", state.step, run.launch.rank), run.device)',
        '"step", state.step, run.launch.rank))',
    ),
]


def copy_tree(folder: Path) -> Path:
    """The files of this folder that git knows or would take, so without weights and
    runs.
    """
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    for name in listed.stdout.split("\0"):
        if name and (ROOT / name).is_file() and not (ROOT / name).is_symlink():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, folder / name)
    return folder


def run_tests(folder: Path, tests: Sequence[str]) -> tuple[bool, str]:
    """Whether they pass, and the first that fails with the reason."""
    command = [sys.executable, "-B", "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
    environ = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "COLUMNS": "250"}
    done = subprocess.run(command, cwd=folder, env=environ, capture_output=True, text=True)
    if done.returncode not in (0, 1):
        raise SystemExit(f"the tests could not run:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    failed = re.search(r"^(?:FAILED|ERROR) \S*::(.*)$", done.stdout, re.MULTILINE)
    return done.returncode == 0, failed[1] if failed else ""


def plant(folder: Path, fault: Fault) -> None:
    """SystemExit where the code has changed, so that the fault must be written again."""
    path = folder / fault.file
    text = path.read_text(encoding="utf-8")
    if text.count(fault.right) != 1:
        raise SystemExit(f"{fault.file} holds {fault.right!r} {text.count(fault.right)} times, not once")
    path.write_text(text.replace(fault.right, fault.wrong), encoding="utf-8")


def try_fault(fault: Fault, folder: Path, cpu: bool) -> tuple[bool, str, bool]:
    """(found, by which test, whether the CPU's runs saw it too)"""
    original = (folder / fault.file).read_text(encoding="utf-8")
    plant(folder, fault)
    try:
        passed, failed = run_tests(folder, ON_PAPER)
        return not passed, failed, cpu and not run_tests(folder, ON_THE_CPU)[0]
    finally:
        (folder / fault.file).write_text(original, encoding="utf-8")


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "--only", type=arguments.positive, nargs="+", metavar="N", help="these faults, counted from 1"
    )
    parser.add_argument("--jobs", type=arguments.positive, default=1, help="faults that are tried at once")
    parser.add_argument("--cpu", action="store_true", help="also see that runs on the CPU are blind to them")
    parser.add_argument("--markdown", type=arguments.expand_home, metavar="F", help="write the table there")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    parser = get_parser()
    args = parser.parse_args(argv)
    numbers = args.only or range(1, len(FAULTS) + 1)
    if not set(numbers) <= set(range(1, len(FAULTS) + 1)):
        parser.error(f"--only: there are {len(FAULTS)} faults, 1 to {len(FAULTS)}")
    own = threading.local()

    with tempfile.TemporaryDirectory() as temporary:

        def work(number: int) -> tuple[bool, str, bool]:
            if not hasattr(own, "folder"):  # a copy for each thread
                own.folder = copy_tree(Path(tempfile.mkdtemp(dir=temporary)))
            return try_fault(FAULTS[number - 1], own.folder, args.cpu)

        passed, failed = run_tests(copy_tree(Path(tempfile.mkdtemp(dir=temporary))), ON_PAPER)
        if not passed:
            print(f"the tests fail without any fault: {failed}")
            return 2
        rows = []
        with concurrent.futures.ThreadPoolExecutor(max(args.jobs, 1)) as pool:
            for number, (found, test, seen) in zip(numbers, pool.map(work, numbers), strict=True):
                rows.append((FAULTS[number - 1], found, test, seen))
                state = "found " if found else "MISSED"
                also = ", and by the CPU's runs" if seen else ""
                print(f"{number:3} {state} {FAULTS[number - 1].what}: {test[:100]}{also}", flush=True)
    if args.markdown:
        Path(args.markdown).write_text(format_table(rows), encoding="utf-8")
    count = sum(found for _, found, _, _ in rows)
    print(f"found {count} of {len(rows)}")
    return 0 if count >= len(rows) - 1 else 1


def format_table(rows: Sequence[tuple[Fault, bool, str, bool]]) -> str:
    lines = ["| fault | found by |", "| --- | --- |"]
    for fault, found, test, _ in rows:
        by = f"`{test.split(' - ')[0]}`" if found else "not found"
        lines.append(f"| {fault.what} | {by} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
