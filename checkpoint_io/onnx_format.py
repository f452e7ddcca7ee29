"""Networks as ONNX files, which onnxruntime computes like torch: checked as they are
written.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import logging
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from errors import UserError

PACKAGES = ("onnx", "onnxscript", "onnxruntime")
TOLERANCE = 1e-4  # largest difference between torch and onnxruntime, of outputs around 1
CHECKED_BATCHES = (1, 3)


def require_packages() -> None:
    """UserError, before any work: a package is missing."""
    for name in PACKAGES:
        if importlib.util.find_spec(name) is None:
            raise UserError(f"`to` onnx needs more packages: pip install {' '.join(PACKAGES)}")


def write_onnx(
    network: nn.Module, image: Sequence[int], path: Path, output: str, facts: Mapping[str, str]
) -> tuple[list[Path], float]:
    """Write `network` for batches of any size of images (channels, height, width), input
    `image` (B, C, H, W), and compare what onnxruntime computes.

    output: the name of the output. facts: kept in the file as its metadata. Returns the
    files (beyond 2 GB the weights are in one of their own) and the largest difference.
    UserError: the difference is above TOLERANCE, or a file cannot be written.
    """
    network = network.eval().cpu().float()
    torch_logs = logging.getLogger("torch.onnx")
    level = torch_logs.level
    torch_logs.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()), torch.no_grad():
            program: Any = torch.onnx.export(
                network,
                (torch.randn(2, *image),),
                dynamo=True,
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                input_names=["image"],
                output_names=[output],
                verbose=False,
            )
    finally:
        torch_logs.setLevel(level)
    program.model.metadata_props.update(facts)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
            program.save(Path(folder) / path.name)
            difference = measure_difference(network, Path(folder) / path.name, image)
            if not difference <= TOLERANCE:
                raise UserError(
                    f"`to` onnx: onnxruntime differs from torch by {difference:.2g}, more than "
                    f"{TOLERANCE:g}: nothing is written"
                )
            names = sorted(os.listdir(folder), key=lambda name: name != path.name)
            for name in reversed(names):
                os.replace(Path(folder) / name, path.with_name(name))
    except OSError as error:
        raise UserError(f"`output` {path}: cannot be written ({error.strerror or error})") from None
    return [path.with_name(name) for name in names], difference


@torch.no_grad()
def measure_difference(network: nn.Module, path: Path, image: Sequence[int]) -> float:
    """Largest difference between torch and onnxruntime over batches of several sizes,
    relative to outputs above 1.
    """
    runtime = importlib.import_module("onnxruntime")
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    generator, worst = torch.Generator().manual_seed(0), 0.0
    for batch in CHECKED_BATCHES:
        images = torch.randn(batch, *image, generator=generator)
        ours: Tensor = network(images)
        theirs = torch.from_numpy(session.run(None, {"image": images.numpy()})[0])
        if theirs.shape != ours.shape:
            return float("inf")
        worst = max(worst, float((ours - theirs).abs().max() / ours.abs().max().clamp(min=1)))
    return worst
