"""What scripts/fuzz.py tries: tiny valid runs of the entry scripts, and seeded ways to
damage what they are given.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import shutil
import struct
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import tiny_runs
import torch
from PIL import Image

CANARY = "canary"  # a file that only code in a hostile file would write
SECRET = "S3CR3TSIGNATURE"
KINDS = ("flags", "weights", "images", "lists")
ENTRIES = (
    "run_vqkd_training",
    "run_beitv2_pretraining",
    "run_class_finetuning",
    "run_segmentation_finetuning",
    "run_linear_eval",
    "encode_images",
    "export_checkpoint",
    "visualize_attention",
    "visualize_codebook",
)
ONE_EPOCH = ("--epochs", "1", "--warmup_epochs", "0")


@dataclass
class Case:
    """One run. With status 0 the output must name one of `named` where `must_name`;
    `check` gives a complaint or None.
    """

    kind: str
    what: str
    entry: str
    argv: list[Any]
    must_fail: bool = False
    must_name: bool = False
    named: tuple[str, ...] = ()
    check: Callable[[Path], str | None] | None = None


def make(kind: str, draw: random.Random, shared: Path, folder: Path) -> Case:
    return {"flags": flag_case, "weights": weight_case, "images": image_case, "lists": list_case}[kind](
        draw, shared, folder
    )


# ── Valid runs ──


def shared_files(folder: Path) -> Path:
    """Data and weights that the cases copy from."""
    photos = tiny_runs.photos(folder / "photos")
    tiny_runs.labeled_pixels(folder / "pairs")
    tiny_runs.tokenizer(folder / "tokenizer.pth")
    tiny_runs.student(folder / "student.pth")
    import_module("make_shards").main(
        [str(photos), str(folder / "shards"), "--images_per_shard", "5", "--classes"]
    )
    quietly("run_class_finetuning", tiny_runs.finetuning_flags(photos, folder / "classifier", *ONE_EPOCH))
    quietly("run_segmentation_finetuning", segmentation(folder, folder / "segmenter"))
    quietly("encode_images", encoding(folder, folder / "encoded"))
    return folder


def quietly(entry: str, argv: list[Any]) -> None:
    """In a process of its own: a run leaves handlers and settings behind."""
    process = os.fork()
    if process == 0:
        status = 1
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            import_module(entry).main([str(word) for word in argv])
            status = 0
        finally:
            os._exit(status)
    if os.waitpid(process, 0)[1]:
        raise SystemExit(f"the valid run of {entry} failed")


def segmentation(data: Path, out: Path) -> list[Any]:
    return tiny_runs.segmentation_flags(data / "pairs", out, "--max_steps", "2", "--steps_per_epoch", "2")


def encoding(data: Path, out: Path) -> list[Any]:
    plain = ["--device", "cpu", "--num_workers", "0", "--batch_size", "4"]
    return [
        "--tokenizer_weight",
        data / "tokenizer.pth",
        "--data_path",
        data / "photos",
        "--output_dir",
        out,
        *plain,
    ]


def linear_eval(photos: Path, weights: Path, out: Path) -> list[Any]:
    data = [
        "--data_set",
        "image_folder",
        "--data_path",
        photos,
        "--eval_data_path",
        photos,
        "--output_dir",
        out,
    ]
    return [
        *data,
        *tiny_runs.SIZE,
        "--finetune",
        weights,
        "--batch_size",
        "4",
        "--epochs",
        "1",
        "--knn_k",
        "1",
    ]


def valid_runs(shared: Path, out: Path) -> dict[str, list[Any]]:
    """Flags with which each entry runs in a second or two."""
    photos, tokenizer, student = shared / "photos", shared / "tokenizer.pth", shared / "student.pth"
    picture = ["--image", photos / "a", "--count", "2", "--device", "cpu"]
    return {
        "run_vqkd_training": tiny_runs.vqkd_flags(photos, out, *ONE_EPOCH),
        "run_beitv2_pretraining": tiny_runs.pretraining_flags(photos, out, tokenizer, *ONE_EPOCH),
        "run_class_finetuning": tiny_runs.finetuning_flags(photos, out, *ONE_EPOCH),
        "run_segmentation_finetuning": segmentation(shared, out),
        "run_linear_eval": linear_eval(photos, student, out),
        "encode_images": encoding(shared, out),
        "export_checkpoint": [
            "--checkpoint",
            student,
            "--to",
            "safetensors",
            "--output",
            out / "x.safetensors",
        ],
        "visualize_attention": ["--checkpoint", student, "--output", out / "x.png", *picture],
        "visualize_codebook": ["--encoded", shared / "encoded", "--output", out / "x.html"],
    }


def fake_programs(folder: Path) -> Path:
    """A folder for PATH: programs that image libraries are known to call, which leave the canary."""
    programs = folder / "bin"
    programs.mkdir(exist_ok=True)
    for name in ("gs", "gswin64c", "inkscape", "convert", "magick", "dot", "xv", "display"):
        (programs / name).write_text(f"#!/bin/sh\ntouch {folder / CANARY}\nexit 1\n")
        (programs / name).chmod(0o755)
    return programs


# ── Flags ──

NUMBERS = (
    "nan",
    "inf",
    "-inf",
    "-1",
    "0",
    "0.5",
    "1",
    "2",
    "1e30",
    "-1e-30",
    "1e400",
    str(10**30),
    "-9223372036854775809",
)
WORDS = (
    "",
    " ",
    "x",
    "None",
    "../..",
    "~",
    "a\x1b[31mb",
    "é",
    "http://[",
    f"https://h/f.pth?sig={SECRET}",
    "\udcff",
    "a" * 5000,
)
LEFT_ALONE = (
    "help",
    "download",
    "dist_url",
    "dist_on_itp",
    "device",
    "num_workers",
    "detect_anomaly",
    "compile",
)


def flag_case(draw: random.Random, shared: Path, folder: Path) -> Case:
    """One to three flags with values of every sort."""
    entry = draw.choice(ENTRIES)
    argv = valid_runs(shared, folder / "out")[entry]
    actions = [
        action
        for action in import_module(entry).get_parser()._actions
        if action.option_strings and action.dest not in LEFT_ALONE and action.nargs != 0
    ]
    given = []
    for action in draw.sample(actions, draw.choice((1, 1, 1, 2, 3))):
        values = (
            (*NUMBERS, *map(str, action.choices))
            if action.choices
            else NUMBERS
            if action.type
            else (*WORDS, *NUMBERS[:6])
        )
        count = draw.randint(1, 3) if action.nargs in ("+", 2) else 1
        given.append(f"{action.option_strings[0]}={draw.choice(values)}")
        given[-1:] = [action.option_strings[0], *draw.choices(values, k=count)] if count > 1 else given[-1:]
    return Case("flags", f"flags {given!a}", entry, [*argv, *given], check=finite_log)


def finite_log(folder: Path) -> str | None:
    """A run that succeeds has a loss."""
    log = folder / "out" / "log.txt"
    for line in log.read_text().splitlines() if log.is_file() else ():
        if not np.isfinite(json.loads(line).get("train_loss", 0.0)):
            return f"train_loss is {json.loads(line)['train_loss']}"
    return None


# ── Weight files ──


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
            [
                "--checkpoint",
                path,
                "--to",
                draw.choice(("timm", "safetensors")),
                "--output",
                out / "x.safetensors",
            ],
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
    return f"{key}: {kind}", kind in (
        "nan",
        "inf",
        "sparse",
        "meta",
        "expanded",
        "shape",
        "gone",
        "text",
        "complex",
    )


class Hostile:
    """Pickles to a call."""

    def __init__(self, call: tuple[Any, tuple[Any, ...]]) -> None:
        self.call = call

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self.call


def hostile_pickle(draw: random.Random, path: Path) -> tuple[str, bool]:
    """Calls that would write the canary, in the new format, the old one and a bare pickle."""
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
    doubled = (
        b"\x80\x02]q\x00"
        + b"".join(
            b"]q" + bytes([i]) + b"h" + bytes([i - 1]) + b"h" + bytes([i - 1]) + b"\x86e" for i in range(0)
        )
        + b"."
    )
    large = records[name].replace(b"K\x80", b"J\xff\xff\xff\x7f", 3)
    kind = draw.choice(("deep", "large", "empty", "digits"))
    records[name] = {
        "deep": deep,
        "large": large,
        "empty": doubled[:1],
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


# ── Images ──


def image_case(draw: random.Random, shared: Path, folder: Path) -> Case:
    """One bad file among the photos, or among the images or masks of segmentation."""
    entry = draw.choice(
        (
            "run_vqkd_training",
            "run_beitv2_pretraining",
            "run_class_finetuning",
            "run_class_finetuning",
            "run_linear_eval",
            "encode_images",
            "run_segmentation_finetuning",
            "visualize_attention",
        )
    )
    data = folder / "data"
    data.mkdir()
    shutil.copytree(shared / "photos", data / "photos")
    shutil.copytree(shared / "pairs", data / "pairs")
    for name in ("tokenizer.pth", "student.pth"):
        os.link(shared / name, data / name)
    if entry == "run_segmentation_finetuning":
        part = draw.choice(("images/training/1.jpg", "annotations/training/1.png", "images/validation/1.jpg"))
        path = data / "pairs" / part
    else:
        path = data / "photos" / "a" / draw.choice(("1.jpg", "3.jpg"))
    what, unreadable = draw.choice(BAD_IMAGES)(draw, path)
    if draw.random() < 0.2 and path.exists():
        path = path.rename(
            path.with_name(
                draw.choice(("\x1b[31m", "a\nb", "\u202egnp", "x\udcff", "ü", "a'b\"c", "-x", "%s{0}"))
                + path.suffix
            )
        )
        what += f", called {path.name!a}"
        if entry == "run_segmentation_finetuning":  # its partner has another name now
            unreadable = False
        return Case("images", f"{entry}: {what}", entry, valid_runs(data, folder / "out")[entry])
    named = (path.name, str(path))
    # those read a part of the images alone
    read = entry != "visualize_attention" and "training" not in path.parts
    must_name = unreadable and read
    return Case(
        "images",
        f"{entry}: {what}",
        entry,
        valid_runs(data, folder / "out")[entry],
        must_name=must_name,
        named=named,
    )


BadImage = Callable[[random.Random, Path], tuple[str, bool]]  # -> in words, whether it cannot be decoded


def cut_image(draw: random.Random, path: Path) -> tuple[str, bool]:
    share = draw.choice((0.0, 0.05, 0.3, 0.6))
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    return f"cut to {share}", True


def flip_image(draw: random.Random, path: Path) -> tuple[str, bool]:
    content = bytearray(path.read_bytes())
    for _ in range(draw.randint(1, 30)):
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(content)
    return "flipped bits", False


def calling_image(draw: random.Random, path: Path) -> tuple[str, bool]:
    """Formats for which an image library calls a program, or that hold programs."""
    contents = {
        "EPS": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 40 40\n%%EndComments\nshowpage\n%%EOF\n",
        "EPS with a binary head": b"\xc5\xd0\xd3\xc6\x1e\0\0\0\x40\0\0\0"
        + b"\0" * 18
        + b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n",
        "PDF": b"%PDF-1.4\n1 0 obj<</Type/Catalog>>endobj\ntrailer<</Root 1 0 R>>\n%%EOF",
        "SVG": (
            b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"><image '
            b'href="file:///etc/passwd"/></svg>'
        ),
        "WMF": b"\xd7\xcd\xc6\x9a" + b"\0" * 60,
        "a shell script": b"#!/bin/sh\ntouch canary\n",
        "MVG": b"push graphic-context\nfill 'url(https://h/\"|touch canary\")'\n",
    }
    kind = draw.choice(list(contents))
    path.write_bytes(contents[kind])
    return kind, True


def odd_file(draw: random.Random, path: Path) -> tuple[str, bool]:
    path.unlink()
    kind = draw.choice(("fifo", "link to nothing", "link to itself", "folder", "noise", "/dev/zero"))
    if kind == "fifo":
        os.mkfifo(path)
    elif kind.startswith("link"):
        path.symlink_to(path if kind.endswith("itself") else "nothing")
    elif kind == "folder":
        path.mkdir()
    elif kind == "/dev/zero":
        path.symlink_to(kind)
    else:
        path.write_bytes(draw.randbytes(3000))
    return kind, kind == "noise"  # what is no regular file may be left out of the list, with a count


def odd_pixels(draw: random.Random, path: Path) -> tuple[str, bool]:
    ramp = np.linspace(0, 1, 40 * 56).reshape(40, 56)
    noise = np.random.RandomState(draw.randrange(1000)).rand(40, 56)
    kind = draw.choice(
        ("float", "int32", "uint16", "line", "column", "pixel", "CMYK", "LA", "P", "1", "LAB", "bomb")
    )
    image = {
        "float": lambda: Image.fromarray((ramp * 1.001).astype("float32")),
        "int32": lambda: Image.fromarray((ramp * 100_000).astype("int32")),
        "uint16": lambda: Image.fromarray((ramp * 4095).astype("uint16")),
        "line": lambda: Image.new("L", (65_000, 1)),
        "column": lambda: Image.new("L", (1, 65_000)),
        "pixel": lambda: Image.new("RGB", (1, 1)),
        "bomb": lambda: Image.new("L", (20_000, 20_000)),
    }.get(
        kind,
        lambda: Image.fromarray((noise * 255).astype("uint8")).convert(
            "RGB" if kind in ("CMYK", "LAB") else kind if kind != "P" else "P"
        ),
    )()
    if kind in ("CMYK",):
        image = image.convert("CMYK")
    image.save(path, "PNG" if image.mode in ("L", "LA", "P", "1", "RGB") else "TIFF")
    return f"{kind} pixels", kind in ("float", "int32", "bomb")


BAD_IMAGES: tuple[BadImage, ...] = (
    cut_image,
    cut_image,
    flip_image,
    calling_image,
    calling_image,
    odd_file,
    odd_pixels,
    odd_pixels,
)


# ── Lists, shards and what lies beside ──


def list_case(draw: random.Random, shared: Path, folder: Path) -> Case:
    return draw.choice((index_file_case, shard_case, shard_case, codes_case, layout_case, beside_case))(
        draw, shared, folder
    )


def index_file_case(draw: random.Random, shared: Path, folder: Path) -> Case:
    lines = [json.dumps({"class": name, "files": [f"{name}/{i}.jpg" for i in range(8)]}) for name in "ab"]
    kind = draw.choice(
        ("deep", "outside", "binary", "twice", "number", "empty", "one class", "control", "missing")
    )
    text = {
        "deep": "[" * 100_000,
        "outside": json.dumps({"class": "a", "files": ["../../etc/passwd"]}),
        "twice": lines[0] + "\n" + lines[0],
        "number": '{"class": 1, "files": [2]}',
        "empty": "",
        "one class": lines[0],
        "control": lines[0].replace('"a"', '"a\\u001b[31m"') + "\n{",
        "missing": lines[0].replace("jpg", "png") + "\n" + lines[1].replace("jpg", "png"),
    }.get(kind, "")
    path = folder / "index.jsonl"
    path.write_bytes(draw.randbytes(400) if kind == "binary" else text.encode())
    argv = [
        *valid_runs(shared, folder / "out")["run_class_finetuning"],
        "--image_folder_class_index_file",
        path,
    ]
    return Case("lists", f"class index file: {kind}", "run_class_finetuning", argv, must_fail=True)


def shard_case(draw: random.Random, shared: Path, folder: Path) -> Case:
    shards = folder / "shards"
    shutil.copytree(shared / "shards", shards)
    first = sorted(shards.glob("*.tar"))[0]
    kind = draw.choice(
        ("cut", "flipped", "index", "classes", "large label", "no label", "not a tar", "hostile names")
    )
    must_fail = kind in ("classes", "large label", "no label", "not a tar")
    if kind == "cut":
        first.write_bytes(first.read_bytes()[: draw.randrange(first.stat().st_size - 1024)])
    elif kind == "flipped":
        flip_image(draw, first)
    elif kind == "index":
        Path(f"{first}.index.npz").write_bytes(draw.choice((b"", b"PK\x03\x04 half", draw.randbytes(300))))
    elif kind == "classes":
        (shards / "classes.txt").write_bytes(draw.choice((b"\xff\xfe\xff", b"", b"a\na\n")))
    elif kind == "not a tar":
        first.write_bytes(draw.choice((b"", draw.randbytes(2048), b"\x1f\x8b" + draw.randbytes(600))))
    else:
        label = {
            "large label": str(10 ** draw.choice((5, 12, 60))),
            "no label": draw.choice(("", "-3", "x")),
        }.get(kind, "0")
        for index in shards.glob("*.npz"):
            index.unlink()
        (shards / "classes.txt").unlink()
        with tarfile.open(first, "w") as tar:
            for i in range(5):
                name = f"../../{i}\x1b[31m" if kind == "hostile names" else str(i)
                for end, content in (
                    (".jpg", (shared / "photos/a/0.jpg").read_bytes()),
                    (".cls", (label if i == 4 else "0").encode()),
                ):
                    member = tarfile.TarInfo(name + end)
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    out = folder / "out"
    argv = [
        *valid_runs(shared, out)["run_class_finetuning"],
        "--data_path",
        shards,
        "--eval_data_path",
        shards,
        "--data_set",
        "webdataset",
    ]
    return Case("lists", f"shards: {kind}", "run_class_finetuning", argv, must_fail)


def codes_case(draw: random.Random, shared: Path, folder: Path) -> Case:
    encoded = folder / "encoded"
    shutil.copytree(shared / "encoded", encoded)
    name = draw.choice(("codes.npy", "about.json", "files.txt"))
    damage = draw.choice(("cut", "noise", "empty", "object", "deep"))
    path = encoded / name
    content = path.read_bytes()
    if damage == "object":
        buffer = io.BytesIO()
        np.save(
            buffer,
            np.array([Hostile((os.system, (f"touch {folder / CANARY}",)))], dtype=object),
            allow_pickle=True,
        )
        path.write_bytes(buffer.getvalue())
    else:
        path.write_bytes(
            {
                "cut": content[: len(content) // 2],
                "noise": draw.randbytes(500),
                "empty": b"",
                "deep": b"[" * 100_000,
            }[damage]
        )
    argv = ["--encoded", encoded, "--output", folder / "x.html", "--data_path", shared / "photos"]
    return Case("lists", f"codes: {name} {damage}", "visualize_codebook", argv, must_fail=True)


def layout_case(draw: random.Random, shared: Path, folder: Path) -> Case:
    """Folders that are not what the flags say."""
    data, out = folder / "data", folder / "out"
    kind = draw.choice(
        ("one level too high", "one class", "empty class", "no images", "a file", "loop", "other endings")
    )
    named: tuple[str, ...] = ()
    if kind == "one level too high":
        shutil.copytree(shared / "photos", data / "train")
        shutil.copytree(shared / "photos", data / "val")
    elif kind == "a file":
        data.write_text("x")
    elif kind == "no images":
        data.mkdir()
    else:
        shutil.copytree(shared / "photos", data)
        if kind == "one class":
            shutil.rmtree(data / "b")
        elif kind == "empty class":
            (data / "c").mkdir()
        elif kind == "loop":
            (data / "a" / "up").symlink_to("..")
            (data / "up").symlink_to(".")
        else:
            (data / "a" / "notes.docx").write_text("x")
            named = (".docx",)
    argv = [*valid_runs(shared, out)["run_class_finetuning"], "--data_path", data, "--eval_data_path", data]
    must_fail = kind not in ("loop", "other endings")
    return Case("lists", f"folder: {kind}", "run_class_finetuning", argv, must_fail, bool(named), named)


def beside_case(draw: random.Random, shared: Path, folder: Path) -> Case:
    """Files that lie beside weights or images: configuration, names, colors, an old log."""
    out = folder / "out"
    out.mkdir()
    content = draw.choice(
        (b"", b"[" * 100_000, b"\xff\xfe", b"{}", b'{"a": NaN}', draw.randbytes(200), b"a\x1b[31m\nb\nc\n")
    )
    kind = draw.choice(("config.json", "log.txt", "class_names", "palette", "mask names"))
    runs = valid_runs(shared, out)
    if kind == "config.json":
        shutil.copy(shared / "student.pth", folder / "pytorch_model.bin")
        (folder / "config.json").write_bytes(content)
        return Case(
            "lists",
            f"config.json {content[:10]!r}",
            "run_class_finetuning",
            [*runs["run_class_finetuning"], "--finetune", folder],
        )
    if kind == "log.txt":
        (out / "log.txt").write_bytes(content)
        return Case(
            "lists", f"log.txt {content[:10]!r}", "run_class_finetuning", runs["run_class_finetuning"]
        )
    (folder / "given.txt").write_bytes(content)
    flag = "--palette" if kind == "palette" else "--class_names"
    argv = [*runs["run_segmentation_finetuning"], flag, folder / "given.txt"]
    return Case("lists", f"{flag} {content[:10]!r}", "run_segmentation_finetuning", argv)
