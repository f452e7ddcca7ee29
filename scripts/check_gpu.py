"""Does it work on this GPU, and how fast is it? (scripts/check_gpu.sh calls this.)

The tests marked `gpu`; a step of every stage in each precision and way beside the CPU's
losses (gpu_steps.py); benchmark.py beside plain PyTorch, timm and transformers; what a
step holds in memory, beside what estimate.py says. All within ten minutes: what does not
fit is left out, and named. Writes a JSON file and prints a table. Exit status: 0, 1 where
something failed, 2 without a GPU.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

import torch  # noqa: E402

import arguments  # noqa: E402
from errors import UserError, report_user_errors  # noqa: E402
from gpu_report import compare_with_cpu, compare_with_targets, format_report  # noqa: E402
from gpu_steps import MEMORY, MODES, has_bf16  # noqa: E402
from runtime.cards import Card, recognize  # noqa: E402

MINUTES, CALL_MINUTES = 10, 3  # of all, and of one part: the rest shall have its turn
CONTESTS = ["pretrain", "vqkd", "finetune"]


def get_parser() -> argparse.ArgumentParser:
    parser = arguments.new_parser("Check and measure this GPU", "--output gpu_report.json")
    add = parser.add_argument
    add("--output", default="gpu_report.json", type=arguments.expand_home, help="JSON file of all results")
    add("--device", default="cuda", choices=["cuda", "cpu"], help="cpu, with --tiny: does the check work?")
    add("--tiny", action="store_true", help="tiny models and batches, for a CPU")
    add(
        "--peak_tflops",
        default=0.0,
        type=arguments.not_negative_number,
        help="data sheet's dense figure in half precision, for MFU; 0: where estimate.py knows the card",
    )
    return parser


class Check:
    """The parts of the check share a folder and a deadline."""

    def __init__(self, folder: Path, device: str, tiny: bool) -> None:
        self.folder, self.device, self.tiny = folder, device, tiny
        self.deadline = time.monotonic() + 60 * MINUTES

    def call(self, name: str, words: list[str]) -> str | None:
        """Run Python on these words; None, or in a few words why that failed."""
        left = self.deadline - time.monotonic()
        if left < 10:
            return f"not run: the {MINUTES} minutes were over"
        seconds = min(left, 60 * CALL_MINUTES)
        print(f"[{MINUTES - left / 60:4.1f} min] {name}", flush=True)
        log = self.folder / f"{name.replace(' ', '_')}.log"
        try:
            with log.open("w") as out:
                command = [sys.executable, *words]
                status = subprocess.run(
                    command, cwd=ROOT, stdout=out, stderr=subprocess.STDOUT, timeout=seconds
                ).returncode
        except subprocess.TimeoutExpired:
            return f"stopped after {seconds:.0f} s"
        lines = log.read_text(errors="replace").strip().splitlines() or [""]
        return None if status == 0 else f"exit status {status}: {lines[-1][:300]}"

    def read(self, name: str) -> dict[str, Any]:
        path = self.folder / name
        return json.loads(path.read_text()) if path.exists() else {}

    # ── The parts ──

    def tests(self) -> dict[str, Any]:
        """The tests marked `gpu`, which the other tests' machines skip."""
        if importlib.util.find_spec("pytest") is None:
            return {"error": "not run: pytest is not installed"}
        files = [str(path) for path in sorted((ROOT / "tests").glob("test_*.py")) if is_marked(path)]
        error = self.call("GPU tests", ["-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", *files])
        log = self.folder / "GPU_tests.log"
        said = log.read_text().strip().splitlines() if log.exists() else []
        return {"result": said[-1].strip("= ") if said else "", "error": error}

    def steps(self) -> list[dict[str, Any]]:
        """A row for each stage and mode: its losses beside those of the CPU in fp32."""
        size, batch = ("demo", 4) if self.tiny else ("small", 8)
        rows: list[dict[str, Any]] = []
        reference: dict[str, Any] = {}
        for mode, (_, stages) in MODES.items():
            if mode == "bf16" and not has_bf16(self.device):
                continue
            words = [str(self.folder), "--size", size, "--batch_size", str(batch), "--device", self.device]
            error = self.call(f"steps, {mode}", ["scripts/gpu_steps.py", mode, *words])
            results = self.read(f"{mode}.json")
            if mode == "reference":
                reference = results
            for stage in stages:
                got = results.get(stage, {"error": error or "no result"})
                if mode != "reference" or "error" in got:
                    verdict = compare_with_cpu(got, reference.get(stage, {}), mode, stage)
                    rows.append({"stage": stage, "mode": mode, **verdict})
        return rows

    def benchmark(self, compiled: bool = False) -> dict[str, Any]:
        """benchmark.py's report, at the largest batch up to 128 that fits."""
        name = "compiled benchmark" if compiled else "benchmark"
        if compiled and self.tiny:
            return {"error": "not run: --tiny"}
        size, batch, rounds = ("demo", 2, 2) if self.tiny else ("base", 128, 6)
        contests = CONTESTS[:1] if compiled else CONTESTS
        while True:
            path = self.folder / f"{name}.json"
            words = ["benchmark.py", "--stage", *contests, "--device", self.device, "--model", size]
            words += ["--batch_size", str(batch), "--rounds", str(rounds), "--output", str(path)]
            error = self.call(f"{name} of {batch} images", words + ["--compile"] * compiled)
            if error is None or batch < 16 or "memory" not in error.lower():
                return {"error": error, "batch_size": batch, **self.read(path.name)}
            batch //= 2

    def memory(self, batch: int) -> list[dict[str, Any]]:
        """A row for each stage: the allocator's peak, and that of estimate.py."""
        size = "demo" if self.tiny else "base"
        words = ["--size", size, "--batch_size", str(batch), "--device", self.device]
        error = self.call("memory", ["scripts/gpu_steps.py", "memory", str(self.folder), *words])
        rows = []
        for stage in MEMORY:
            row = {"stage": stage, **self.read("memory.json").get(stage, {"error": error or "no result"})}
            if "error" not in row:
                path = self.folder / f"estimate-{stage}.json"
                more = ["--gpus", "1", "--output", str(path)]
                if (card := find_card(self.device)) is not None:
                    more += ["--gpu", card.name]
                row["estimate_error"] = self.call(
                    f"estimate of {stage}", ["estimate.py", row["script"], *row["flags"], *more]
                )
                row["estimated_bytes"] = self.read(path.name).get("peak_bytes")
            rows.append(row)
        return rows


def is_marked(path: Path) -> bool:
    return "mark.gpu" in path.read_text()


def find_card(device: str) -> Card | None:
    """This GPU's row in estimate.py's table of cards, if it has one."""
    if device != "cuda":
        return None
    properties = torch.cuda.get_device_properties(0)
    return recognize(properties.name, properties.total_memory)


def describe_machine(device: str) -> dict[str, Any]:
    facts: dict[str, Any] = {"torch": torch.__version__, "python": sys.version.split()[0]}
    if device == "cuda":
        gpu = torch.cuda.get_device_properties(0)
        facts |= {"gpu": gpu.name, "memory": gpu.total_memory, "capability": [gpu.major, gpu.minor]}
        facts["cuda"] = torch.version.cuda
    return facts


@report_user_errors
def main(argv: list[str] | None = None) -> int:
    args = arguments.parse(get_parser(), argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "there is no GPU that this torch can use, so nothing was checked (--device cpu --tiny tries the "
            "check itself)"
        )
    output, started = Path(args.output).resolve(), time.monotonic()
    report: dict[str, Any] = {"machine": describe_machine(args.device)}
    with tempfile.TemporaryDirectory(prefix="check_gpu_") as folder:
        check = Check(Path(folder), args.device, args.tiny)
        report["tests"] = check.tests()
        report["steps"] = check.steps()
        report["benchmark"] = check.benchmark()
        report["memory"] = check.memory(report["benchmark"]["batch_size"])
        report["compiled_benchmark"] = check.benchmark(compiled=True)
    card = find_card(args.device)
    report["targets"] = compare_with_targets(report, args.peak_tflops or (card.tflops if card else 0.0))
    failed = [report["tests"], report["benchmark"], *report["memory"]]
    report["ok"] = all(row["ok"] for row in report["steps"]) and not any(row.get("error") for row in failed)
    wrong = [str(row.get("estimate_error")) for row in report["memory"]]
    report["ok"] &= not any(error.startswith("exit status") for error in wrong)  # one may lack the time
    report["seconds"] = round(time.monotonic() - started)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(report, indent=1) + "\n")
    print("\n".join(format_report(report)))
    result = "all right" if report["ok"] else "SOMETHING FAILED"
    print(f"\n{result} in {report['seconds']} s; written to {output}")
    return 0 if report["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
