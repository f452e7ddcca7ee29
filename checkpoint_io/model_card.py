"""The README.md of an exported model: what it is, how to open it, and what was measured
of it, from the files beside its checkpoint.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from checkpoint_io import published
from checkpoint_io.export import ExportableModel

# files of a run, and which of their numbers are results: beginnings of keys
MEASUREMENTS = {"eval.json": ("test_",), "knn.json": ("knn",), "log.txt": ("test_", "train_loss")}
# flags of the training that say how it was done, and nothing of whose machine
TRAINING = (
    "model epochs batch_size update_freq lr weight_decay layer_decay warmup_epochs drop_path mixup "
    "cutmix smoothing label_fraction codebook_size num_mask_patches seed"
).split()
TASKS = {"timm": "timm", "huggingface": "transformers"}


def find_measurements(path: Path, source: str) -> dict[str, dict[str, float]]:
    """Where it was measured -> name -> number: of the files of a run beside the
    checkpoint, or what was published for a name.
    """
    found: dict[str, dict[str, float]] = {}
    if entry := published.ENTRIES.get(source):
        return {"published": dict(entry.metrics)} if entry.metrics else {}
    for name, beginnings in MEASUREMENTS.items():
        try:
            content = json.loads((path.with_name(name)).read_text(encoding="utf-8").splitlines()[-1])
        except ValueError:
            content = _read_json(path.with_name(name))
        except (OSError, IndexError):
            continue
        numbers = {
            key: float(value)
            for key, value in (content.items() if isinstance(content, Mapping) else ())
            if key.startswith(beginnings) and isinstance(value, (int, float))
        }
        if numbers:
            found[name] = numbers
    return found


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def make_card(
    model: ExportableModel, library: str, name: str, measured: Mapping[str, Mapping[str, float]]
) -> str:
    """`library`: timm or huggingface; `name`: of the repository; `measured`: as of
    find_measurements.
    """
    s, prepared = model.settings, model.prepared
    task = "image-classification" if s["num_classes"] else "image-feature-extraction"
    opened = (
        f'timm.create_model("hf-hub:{name}", pretrained=True)'
        if library == "timm"
        else f"transformers.AutoModel{'ForImageClassification' if s['num_classes'] else ''}"
        f'.from_pretrained("{name}")'
    )
    head = f"{s['num_classes']} classes" if s["num_classes"] else "no classifier"
    trained = [f"| {flag} | {model.flags[flag]} |" for flag in TRAINING if flag in model.flags]
    rows = [
        f"| {key} | {value:.4g} | {where} |"
        for where, numbers in measured.items()
        for key, value in numbers.items()
    ]
    lines = [
        *("---", f"library_name: {TASKS[library]}", f"pipeline_tag: {task}", "tags:", "- beit", "---"),
        f"# {name.split('/')[-1]}",
        f"A BEiT vision transformer ({model.name or 'of a size of its own'}): {s['embed_dim']} wide, "
        f"{s['depth']} deep, {s['num_heads']} heads, patches of {s['patch_size']} pixels in images of "
        f"{' x '.join(map(str, s['img_size']))}, {head}.",
        "",
        *("```python", f"import {opened.split('.')[0]}", "", f"model = {opened}", "```"),
        "",
        f"Images: center crop of {prepared.crop_pct:g}, mean {_join(prepared.mean)}, std "
        f"{_join(prepared.std)}{'' if model.pixels.is_rgb8 else f', of {model.pixels}'}.",
        "",
        "## Measured",
        *(["| what | value | from |", "| --- | --- | --- |", *rows] if rows else ["Nothing was measured."]),
    ]
    if trained:
        lines += ["", "## Training", "| flag | value |", "| --- | --- |", *trained]
    return "\n".join(lines) + "\n"


def _join(values: tuple[float, ...]) -> str:
    return " ".join(f"{value:g}" for value in values)
