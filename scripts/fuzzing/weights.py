"""Weight files that are damaged, or hostile."""

from __future__ import annotations

import os
import pickle
import random
import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import tiny_runs
import torch
from PIL import Image

from fuzzing.runs import CANARY, Case, linear_eval, valid_runs


def weight_case(draw: random.Random, shared: Path, folder: Path) -> Case:
    """A damaged or hostile file wherever weights are taken."""
    source = draw.choice(
        ("classifier/checkpoint.pth", "student.pth", "tokenizer.pth", "segmenter/checkpoint.pth")
    )
    path = folder / "weights.pth"
    shutil.copy(shared / source, path)
    what, must_fail = draw.choice(DAMAGES)(draw, path)
    if draw.random() < 0.1 and path.suffix == ".pth":
        path = path.rename(path.with_suffix(".safetensors"))
        what += ", called .safetensors"  # which means nothing: files are told by content
    out, photos = folder / "out", shared / "photos"
    runs = valid_runs(shared, out)
    uses: dict[str, list[tuple[str, list[Any]]]] = {
        "tokenizer.pth": [
            ("run_beitv2_pretraining", [*runs["run_beitv2_pretraining"], "--tokenizer_weight", path]),
            ("encode_images", [*runs["encode_images"], "--tokenizer_weight", path]),
        ],
        "segmenter/checkpoint.pth": [
            ("run_segmentation_finetuning", [*runs["run_segmentation_finetuning"], "--finetune", path]),
            (
                "run_segmentation_finetuning",
                [*runs["run_segmentation_finetuning"], "--resume", path, "--eval"],
            ),
            (
                "run_segmentation_finetuning",
                [*runs["run_segmentation_finetuning"], "--resume", path, "--max_steps", "3"],
            ),
        ],
    }
    backbone: list[tuple[str, list[Any]]] = [
        ("run_class_finetuning", [*runs["run_class_finetuning"], "--finetune", path]),
        ("run_linear_eval", linear_eval(photos, path, out)),
        ("run_segmentation_finetuning", [*runs["run_segmentation_finetuning"], "--finetune", path]),
        (
            "export_checkpoint",
            tiny_runs.as_flags(
                checkpoint=path, to=draw.choice(("timm", "safetensors")), output=out / "x.safetensors"
            ),
        ),
        ("visualize_attention", [*runs["visualize_attention"], "--checkpoint", path]),
    ]
    if source.startswith("classifier"):
        resumed = [*runs["run_class_finetuning"], "--epochs", "2"]
        backbone += [
            ("run_class_finetuning", [*resumed, "--resume", path]),
            ("run_class_finetuning", [*resumed, "--auto_resume"]),
        ]
        backbone += [("run_class_finetuning", [*runs["run_class_finetuning"], "--eval", "--resume", path])]
    entry, argv = draw.choice(uses.get(source, backbone))
    if argv[-1] == "--auto_resume":
        out.mkdir()
        path.rename(out / "checkpoint.pth")
    return Case("weights", f"{source}: {what}", entry, argv, must_fail)


Damage = Callable[[random.Random, Path], tuple[str, bool]]  # -> in words, whether the file must be refused


def truncate(draw: random.Random, path: Path) -> tuple[str, bool]:
    share = draw.choice((0.0, 0.001, draw.random(), 0.999))
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    return f"cut to {share:.3f}", True


def flip_in_a_tensor(draw: random.Random, path: Path) -> tuple[str, bool]:
    """A bit of what zip stores for a tensor: its checksum no longer fits."""
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        record = draw.choice(
            [info for info in archive.infolist() if "/data/" in info.filename and info.file_size]
        )
    start = record.header_offset + 30 + int.from_bytes(content[record.header_offset + 26 :][:2], "little")
    start += int.from_bytes(content[record.header_offset + 28 :][:2], "little")
    content[start + draw.randrange(record.file_size)] ^= 1 << draw.randrange(8)
    path.write_bytes(content)
    return f"a flipped bit in {record.filename}", True


def flip_anywhere(draw: random.Random, path: Path) -> tuple[str, bool]:
    """Headers and padding too, where it may be harmless."""
    content = bytearray(path.read_bytes())
    for _ in range(draw.randint(1, 20)):
        content[draw.randrange(len(content)) if draw.random() < 0.3 else -1 - draw.randrange(4000)] ^= (
            1 << draw.randrange(8)
        )
    path.write_bytes(content)
    return "flipped bits", False


def recompress(_: random.Random, path: Path) -> tuple[str, bool]:
    with zipfile.ZipFile(path) as archive:
        records = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in records.items():
            archive.writestr(name, content)
    return "compressed again", False


def drop_a_record(draw: random.Random, path: Path) -> tuple[str, bool]:
    with zipfile.ZipFile(path) as archive:
        records = {info.filename: archive.read(info) for info in archive.infolist()}
    gone = draw.choice([name for name in records if "/data/" in name or name.endswith("data.pkl")])
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in records.items():
            if name != gone:
                archive.writestr(name, content)
    return f"without {gone}", True


def change_tensors(draw: random.Random, path: Path) -> tuple[str, bool]:
    """Values that are not finite, other shapes and kinds of tensors."""
    content = torch.load(path, weights_only=True)
    weights = content["model"]
    key = draw.choice(
        [
            key
            for key, value in weights.items()
            if value.is_floating_point() and value.numel() > 1 and "blocks.0" in key
        ]
    )
    value, kind = (
        weights[key],
        draw.choice(("nan", "inf", "shape", "sparse", "meta", "expanded", "gone", "text", "complex")),
    )
    changed: Any = {
        "nan": lambda: torch.where(torch.arange(value.numel()).view_as(value) == 0, torch.nan, value),
        "inf": lambda: torch.where(torch.arange(value.numel()).view_as(value) == 0, torch.inf, value),
        "shape": lambda: torch.zeros(*value.shape, 2),
        "sparse": value.to_sparse,
        "meta": lambda: value.to("meta"),
        "expanded": lambda: torch.zeros(1).expand(value.shape),
        "gone": lambda: None,
        "text": lambda: "text",
        "complex": lambda: value.to(torch.complex64),
    }[kind]()
    weights[key] = changed
    if kind == "gone":
        del weights[key]
    torch.save(content, path)
    return f"{key}: {kind}", True


class Hostile:
    """Pickles to a call."""

    def __init__(self, call: tuple[Any, tuple[Any, ...]]) -> None:
        self.call = call

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self.call


def hostile_pickle(draw: random.Random, path: Path) -> tuple[str, bool]:
    """Calls that would write the canary, in the new format, the old one and a bare
    pickle.
    """
    canary = str(path.parent / CANARY)
    calls = [(os.system, (f"touch {canary}",)), (exec, (f"open({canary!r}, 'w')",)), (open, (canary, "w"))]
    call = draw.choice(calls)
    content = {"model": {"cls_token": torch.zeros(1)}, "args": Hostile(call)}
    form = draw.choice(("zip", "old", "pickle"))
    if form == "pickle":
        path.write_bytes(pickle.dumps(content["args"]))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "zip")
    return f"a call of {call[0].__name__} ({form})", True


def torchscript(_: random.Random, path: Path) -> tuple[str, bool]:
    """An archive whose __setstate__ would write a file."""
    canary = str(path.parent / CANARY)
    source = (
        "import torch\nfrom typing import Tuple\n\nclass Writes(torch.nn.Module):\n    def __init__(self):\n"
        "        super().__init__()\n        self.w = torch.nn.Parameter(torch.zeros(2))\n"
        "    @torch.jit.export\n    def __getstate__(self) -> Tuple[torch.Tensor, bool]:\n"
        "        return (self.w, self.training)\n"
        f"    @torch.jit.export\n    def __setstate__(self, state: Tuple[torch.Tensor, bool]) -> None:\n"
        "        self.w = state[0]\n        self.training = state[1]\n        torch.save(state[0], "
        f"{canary!r})\n"
        "    def forward(self, x: torch.Tensor) -> torch.Tensor:\n        return x + self.w\n"
    )
    module = path.with_name("writes_module.py")
    module.write_text(source)
    import importlib.util

    spec = importlib.util.spec_from_file_location(f"writes_{path.parent.name}", module)
    assert spec is not None and spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    torch.jit.script(loaded.Writes()).save(str(path))
    return "a TorchScript archive with __setstate__", True


def pickle_bomb(draw: random.Random, path: Path) -> tuple[str, bool]:
    """Pickles that are deep, long, or claim a storage larger than the file."""
    with zipfile.ZipFile(path) as archive:
        records = {info.filename: archive.read(info) for info in archive.infolist()}
    name = next(name for name in records if name.endswith("data.pkl"))
    deep = b"\x80\x02" + b"]" * 200_000 + b"a" * 199_999 + b"."
    large = records[name].replace(b"K\x80", b"J\xff\xff\xff\x7f", 3)
    kind = draw.choice(("deep", "large", "empty", "digits"))
    records[name] = {
        "deep": deep,
        "large": large,
        "empty": b"\x80",
        "digits": b"\x80\x02\x8b" + struct.pack("<i", 1 << 20) + b"\x01" * (1 << 20) + b".",
    }[kind]
    with zipfile.ZipFile(path, "w") as archive:
        for each, content in records.items():
            archive.writestr(each, content)
    return f"a pickle that is {kind}", True


def other_content(draw: random.Random, path: Path) -> tuple[str, bool]:
    kind = draw.choice(("noise", "text", "json", "list", "numpy", "png", "html", "folder", "fifo"))
    path.unlink()
    if kind == "folder":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "numpy":
        np.savez(path.with_suffix(".npz"), a=np.zeros(3))
        path.with_suffix(".npz").rename(path)
    elif kind == "list":
        torch.save([torch.zeros(2)], path)
    elif kind == "png":
        Image.new("RGB", (8, 8)).save(path, "PNG")
    else:
        path.write_bytes(
            {"noise": draw.randbytes(5000), "text": b"text\n", "json": b"[" * 100_000, "html": b"<html>"}[
                kind
            ]
        )
    return kind, True


DAMAGES: tuple[Damage, ...] = (
    truncate,
    flip_in_a_tensor,
    flip_in_a_tensor,
    flip_anywhere,
    recompress,
    drop_a_record,
    change_tensors,
    change_tensors,
    change_tensors,
    hostile_pickle,
    hostile_pickle,
    torchscript,
    pickle_bomb,
    other_content,
)
