"""Weights of whatever library, with what is written in the file and beside it: flags,
configuration, class names.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from checkpoint_io import checkpoints, downloads, published, weight_files
from checkpoint_io.hub import WEIGHT_FILES
from checkpoint_io.huggingface_format import is_huggingface, read_huggingface_config
from checkpoint_io.remapping import add_class_position, to_our_names
from checkpoint_io.timm_format import read_timm_config
from checkpoint_io.weight_formats import INDEX, TABLE, ExternalConfig, strip_wrappers
from data_pipeline.imagenet_classes import in_words, synsets
from errors import UserError
from layers.rel_pos_bias import as_pair, relative_position_index
from transforms import default_crop_pct, normalization


class WeightSource(NamedTuple):
    """Weights under our names, the flags of their training ({} where unknown), the
    names of the classes (of their folders: ImageNet's are WordNet ids), and what
    another library says of the model.
    """

    weights: dict[str, Tensor]
    flags: dict[str, Any]
    classes: list[str] | None
    external: ExternalConfig
    library: str
    path: Path


def read_weights(
    checkpoint: str,
    expected: str = "auto",
    ema: bool = False,
    keys: str = "model|module",
    select: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None = None,
    origin: str = "`checkpoint`",
) -> WeightSource:
    """`checkpoint`: a file, a folder of timm or Hugging Face, a URL, a published name or
    an id of Hugging Face's hub. `expected`: whose names it has, "ours", "timm", "huggingface" or "auto".
    `ema`: the moving average of the weights instead of the last ones; `keys`: where in
    the file the weights are; `select`: takes a part of them, under the file's own
    names. `origin`: the parameter that names it, for messages.

    UserError: as downloads.fetch; names of another library; no moving average; another
    kind of model.
    """
    path, config, preprocessor = locate(checkpoint, origin)
    content = weight_files.load_file(path)
    beside = {**checkpoints.read_header(path), **(content if isinstance(content, dict) else {})}
    if ema and not isinstance(beside.get("model_ema"), dict):
        raise UserError(
            f"{origin} {checkpoint} holds no moving average of the weights (model_ema), which "
            "run_class_finetuning keeps with `model_ema`: ask for the weights themselves"
        )
    found = weight_files.extract_weights(content, checkpoint, "model_ema" if ema else keys)
    try:
        found = strip_wrappers(found if select is None else select(found))
    except UserError as error:
        raise UserError(f"{origin} {checkpoint}: {error}") from None
    huggingface = is_huggingface(found)
    library = "huggingface" if huggingface else "timm" if "architecture" in config else "ours"
    if expected != "auto" and huggingface != (expected == "huggingface"):
        names = "Hugging Face's" if huggingface else "ours, which are timm's too"
        raise UserError(
            f"`from` {expected}: the names in {checkpoint} are {names}; `from` auto sees by itself"
        )
    entry = published.ENTRIES.get(path.stem)
    flags = weight_files.flags_to_dict(beside.get("args"))
    stage = beside.get("stage")
    classes = stage.get("classes") if isinstance(stage, dict) else None
    if entry is not None:  # v2 was trained with ImageNet's mean and std, v1 with 0.5 (docs/recipes.md)
        flags = {"imagenet_default_mean_and_std": path.stem.startswith("beitv2"), **flags}
        if entry.kind == "segmentation":  # ADE20K
            flags = {"input_size": 512, "reduce_zero_label": True, **flags}
        classes = synsets() if len(found.get("head.bias", ())) == len(synsets()) else None
    external = ExternalConfig(None, None, None, None)
    try:
        if library == "huggingface" and config:
            external = read_huggingface_config(config, preprocessor)
        elif library == "timm":
            external = read_timm_config(config)
        weights = to_our_names(found)
    except UserError as error:
        raise UserError(f"{origin} {checkpoint}: {error}") from None
    flags = {**to_flags(external), **flags}
    weights = add_class_position(add_grid_index(weights, flags.get("input_size")))
    return WeightSource(weights, flags, to_folder_names(external.classes) or classes, external, library, path)


def to_flags(external: ExternalConfig) -> dict[str, Any]:
    """What another library says of its images, as our flags."""
    size, prepared = external.img_size, external.prepared
    flags: dict[str, Any] = {}
    if size is not None:
        flags["input_size"] = size[0] if size[0] == size[1] else size
    if prepared is not None:
        flags["imagenet_default_mean_and_std"] = prepared[:2] == normalization(True)
        if prepared[:2] not in (normalization(True), normalization(False)):
            flags |= {"in_chans": len(prepared.mean), "mean_std": [*prepared.mean, *prepared.std]}
        flags["crop_pct"] = to_crop_flag(prepared.crop_pct, size or 224)
    return flags | ({} if external.image_range is None else {"image_range": list(external.image_range)})


def to_crop_flag(crop_pct: float, size: int | tuple[int, int]) -> float | None:
    """The flag `crop_pct`; None where ours, left out, crops the same pixels."""
    side = min(as_pair(size))
    return None if int(side / crop_pct) == int(side / default_crop_pct(size)) else crop_pct


def add_grid_index(weights: dict[str, Tensor], size: Any) -> dict[str, Tensor]:
    """The weights with an index of relative positions, which tells a grid of any shape,
    where the size of the images is known, fits, and nothing else tells the grid:
    absolute positions do not, and timm's files hold no index.
    """
    patches = weights.get("patch_embed.proj.weight")
    if size is None or patches is None or any(key.endswith(INDEX) for key in weights):
        return weights
    (height, width), patch = as_pair(size), patches.shape[-1]
    grid = height // patch, width // patch
    table = next((value for key, value in weights.items() if key.endswith(TABLE)), None)
    if "pos_embed" in weights:
        fits = weights["pos_embed"].shape[1] == grid[0] * grid[1] + 1
    else:
        fits = table is not None and len(table) == (2 * grid[0] - 1) * (2 * grid[1] - 1) + 3
    return {**weights, f"blocks.0.attn.{INDEX}": relative_position_index(grid)} if fits else weights


def locate(source: str, origin: str) -> tuple[Path, dict[str, Any], dict[str, Any]]:
    """The weight file, and the config.json and preprocessor_config.json that belong to
    it ({} where there is none).
    """
    folder = Path(os.path.expanduser(source))
    if os.path.isdir(folder):  # pathlib's is_dir fails on a URL longer than a file name
        present = [folder / name for name in WEIGHT_FILES if (folder / name).is_file()]
        if not present:
            raise UserError(
                f"{origin} {source}: a folder without {' or '.join(WEIGHT_FILES)}; name the weight file "
                "itself"
            )
        path = present[0]
    else:
        path = downloads.fetch(source)
    if path.name not in WEIGHT_FILES:
        config = read_json(path.with_suffix(".json"))  # as export_checkpoint puts it beside a file for timm
        return path, (config if "architecture" in config else {}), {}
    return (
        path,
        read_json(path.with_name("config.json")),
        read_json(path.with_name("preprocessor_config.json")),
    )


def read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is no JSON ({error}): mend it, or take it away") from None
    return content if isinstance(content, dict) else {}


def to_folder_names(names: list[str] | None) -> list[str] | None:
    """Class names of another library as those of the folders that our data sets take
    them from: ImageNet's are WordNet ids.
    """
    if names is None or len(names) != len(synsets()):
        return names
    same = sum(name.split(",")[0] == in_words(synset) for name, synset in zip(names, synsets(), strict=True))
    return synsets() if same > 0.9 * len(names) else names  # lists of them differ in a few words


def save_weights(
    path: Path,
    weights: dict[str, Tensor],
    flags: dict[str, Any] | None = None,
    classes: list[str] | None = None,
) -> None:
    """Write weights to a .safetensors or .pth file, atomically.

    Flags and the names of the classes lie beside the weights in a .pth, as text in the
    header of a .safetensors.
    """
    stage = {"stage": {"classes": classes}} if classes else {}
    extra: dict[str, Any] = {} if flags is None else {"args": flags, **stage}
    tensors = {
        key: value.detach().clone(memory_format=torch.contiguous_format) for key, value in weights.items()
    }
    part = path.with_name(f".{path.name}.{os.getpid()}{checkpoints.PART}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix != ".safetensors":
            checkpoints.write_checkpoint({"model": tensors, **extra} if extra else tensors, path)
            return
        part.touch()
        mode = part.stat().st_mode
        safetensors.torch.save_file(
            tensors, part, {"format": "pt", **{key: json.dumps(value) for key, value in extra.items()}}
        )
        part.chmod(mode)  # safetensors makes files that only their owner can read
        os.replace(part, path)
    except (OSError, safetensors.SafetensorError) as error:
        with contextlib.suppress(OSError):
            part.unlink()
        raise UserError(
            f"`output` {path}: cannot be written ({getattr(error, 'strerror', None) or error})"
        ) from None


def translate_process_type(flags: Mapping[str, Any]) -> dict[str, Any]:
    """The flags of a training, where a tokenizer's normalization, its `process_type`, is
    said as the other stages say theirs, by `imagenet_default_mean_and_std`.
    """
    if "process_type" not in flags:
        return dict(flags)
    return {**flags, "imagenet_default_mean_and_std": flags["process_type"] == "imagenet_norm"}
