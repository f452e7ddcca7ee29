"""What scripts/check_gpu.py makes of its results: which steps are right, which targets are
met, and a table.
"""

from __future__ import annotations

import math
from typing import Any

from gpu_steps import MODES, SCRIPTS

TOLERANCE = {"fp32": 1e-3}  # relative, of losses above 1; all other modes compute in half precision
HALF = 2e-2
NORM = 10  # times that, for the norm of the first gradient


def compare_with_cpu(got: dict[str, Any], expected: dict[str, Any], mode: str, stage: str) -> dict[str, Any]:
    """The result with its distance from the CPU's, and whether that is small enough.

    The second loss counts where the first step was taken: fp16 may skip it, in search of
    its scale. The linear probe's gradient is left out: batch normalization of the
    features of random weights enlarges every rounding.
    """
    tolerance = TOLERANCE.get(mode, HALF)
    if "error" in got or "losses" not in expected:
        return {"ok": False, "error": got.get("error", "the CPU has no result to compare with")}
    norms = got["grad_norms"]
    counted = 1 if norms[0] is None else len(got["losses"])
    pairs = zip(got["losses"][:counted], expected["losses"], strict=False)
    difference = max(distance(mine, theirs, 1.0) for mine, theirs in pairs)
    ok = difference <= tolerance
    row = {**got, "cpu_losses": expected["losses"], "difference": difference, "tolerance": tolerance}
    if norms[0] is not None and stage != "linear":
        row["norm_difference"] = distance(norms[0], expected["grad_norms"][0], 0.0)
        ok = ok and row["norm_difference"] <= NORM * tolerance
    return {**row, "ok": ok}


def distance(mine: float, theirs: float, at_least: float) -> float:
    value = abs(mine - theirs) / max(at_least, abs(theirs), 1e-12)
    return value if math.isfinite(value) else math.inf


def compare_with_targets(report: dict[str, Any], peak_tflops: float) -> list[dict[str, Any]]:
    """What this project wants of a GPU (`target`, None where it wants nothing), beside
    what was measured. `peak_tflops`: of the data sheet; 0: unknown, so no MFU.
    """
    rows = []
    for kind in ("benchmark", "compiled_benchmark"):
        compiled = kind.startswith("compiled")
        for contest in report[kind].get("contests", ()):
            pretrains = contest["stage"] == "pretrain"
            name = contest["name"] + (", compiled" if compiled else "")
            ours, *others = contest["rows"]
            if peak_tflops and contest["flops"]:
                mfu = contest["flops"] / (ours["ms"]["step"] / 1000) / (peak_tflops * 1e12)
                rows.append(at_least(f"MFU, {name}", mfu, 0.45 if pretrains and compiled else None))
            ratios = [row["ratio"] for row in others if row["name"] == "plain" and pretrains]
            rows += [at_least(f"times as fast as plain, {name}", ratio, 2.0) for ratio in ratios]
    for row in report["memory"]:
        if row.get("estimated_bytes"):
            off = abs(row["estimated_bytes"] / row["peak_bytes"] - 1)
            named = {"what": f"estimate of memory off by, {row['stage']}", "value": off}
            rows.append({**named, "target": 0.05, "met": off <= 0.05})
    return rows


def at_least(what: str, value: float, target: float | None) -> dict[str, Any]:
    return {
        "what": what,
        "value": value,
        "target": target,
        "met": None if target is None else value >= target,
    }


def format_report(report: dict[str, Any]) -> list[str]:
    """A table for the terminal."""
    tests = report["tests"]
    lines = ["", join("GPU tests:", tests.get("result"), tests["error"])]
    lines += ["", *format_steps(report["steps"])]
    for kind in ("benchmark", "compiled_benchmark"):
        lines += ["", *format_benchmark(kind.replace("_", " "), report[kind])]
    lines += ["", "peak memory of a step, MiB"]
    for row in report["memory"]:
        said = row.get("error") or f"{row['peak_bytes'] / 2**20:9.0f}"
        if row.get("estimated_bytes"):
            said += f", estimate.py {row['estimated_bytes'] / 2**20:.0f}"
        lines.append(join(f"  {row['stage']:10}{said}", row.get("estimate_error")))
    lines.append("")
    for row in report["targets"]:
        result = {None: "", True: "met", False: "missed"}[row["met"]]
        lines.append(
            join(f"{row['what']}: {row['value']:.3g}", result and f"(target {row['target']}: {result})")
        )
    return lines


def format_steps(rows: list[dict[str, Any]]) -> list[str]:
    modes = [mode for mode in MODES if mode != "reference"]
    lines = ["largest difference of a loss from the CPU's in fp32"]
    lines.append(f"{'':10}" + "".join(f"{mode:>16}" for mode in modes))
    cells = {(row["stage"], row["mode"]): format_cell(row) for row in rows}
    for stage in SCRIPTS:
        lines.append(f"{stage:10}" + "".join(f"{cells.get((stage, mode), '-'):>16}" for mode in modes))
    return lines + [f"{row['stage']}, {row['mode']}: {row['error']}" for row in rows if row.get("error")]


def format_cell(row: dict[str, Any]) -> str:
    if row.get("error"):
        return "ERROR"
    return f"{row['difference']:.1e}" + ("" if row["ok"] else " FAILED")


def format_benchmark(name: str, part: dict[str, Any]) -> list[str]:
    images = f"{part['batch_size']} images" if "batch_size" in part else None
    lines = [join(f"{name}:", images, part["error"])]
    for contest in part.get("contests", ()):
        lines.append(contest["name"])
        for row in contest["rows"]:
            share = "" if row["utilization"] is None else f"{row['utilization']:.0%} of a matrix product"
            figures = f"{row['images_per_s']:10.1f} images/s{row['peak_bytes'] / 2**20:9.0f} MiB"
            lines.append(join(f"  {row['name']:14}{figures}{row['ratio']:8.2f} x ours ", share))
        lines += [f"  {name:14}{reason}" for name, reason in contest["absent"].items()]
    return lines


def join(*parts: str | None) -> str:
    return " ".join(part for part in parts if part)
