"""Lists of files, shards, folders, and what lies beside images and weights."""

from __future__ import annotations

import io
import json
import os
import random
import shutil
import tarfile
from pathlib import Path

import numpy as np
import tiny_runs

from fuzzing.images import flip_image
from fuzzing.runs import CANARY, Case, valid_runs
from fuzzing.weights import Hostile


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
        *tiny_runs.as_flags(data_path=shards, eval_data_path=shards, data_set="webdataset"),
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
    """Files that lie beside weights or images: configuration, names, colors, an old
    log.
    """
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
