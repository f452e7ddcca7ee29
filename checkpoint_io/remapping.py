"""Weights of another model into one of ours: names, patch grids, patch embeddings, and
a report of what became of each.

Shapes: C width, H heads. Sources: BEiT's fine-tuning at other resolutions; timm (patch
embeddings); FlexiViT (patch sizes).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from timm.layers import resample_patch_embed
from timm.models import adapt_input_conv
from torch import Tensor, nn

from checkpoint_io.huggingface_format import from_huggingface, is_huggingface
from checkpoint_io.weight_formats import (
    INDEX,
    SHARED_TABLE,
    TABLE,
    Weights,
    from_plain_blocks,
    refuse_other_parts,
    strip_wrappers,
)
from errors import UserError, count
from layers.rel_pos_bias import grid_of, resize_pos_embed, resize_rel_pos_bias_table

PATCHES = "patch_embed.proj.weight"


def to_our_names(state_dict: Mapping[str, Tensor]) -> Weights:
    """A state dict of Hugging Face's BEiT, timm's, or a plain ViT under our names. One
    that has our names already is returned as it is, without a copy.

    Unknown keys (a segmentation head) keep their names. UserError: as strip_wrappers,
    from_plain_blocks and refuse_other_parts; a Hugging Face layer without its q, k or
    v.
    """
    bare = strip_wrappers(state_dict)
    ours = from_plain_blocks(from_huggingface(bare) if is_huggingface(bare) else bare)
    refuse_other_parts(ours)
    return ours


def infer_patch_grid(weights: dict[str, Tensor]) -> tuple[int, int] | None:
    """(height, width) in patches of the model that `weights` are of; None for a model
    without positions.

    The index of a relative bias tells a grid of any shape. Without it the grid is taken
    to be square; UserError if it cannot be.
    """
    for key, index in weights.items():
        if key.endswith("relative_position_index") and index.ndim == 2 and len(index) > 1:
            first_row = index[1, 1:].tolist()  # from patch 0: falls by 1 along a row, then by more
            falls = (i for i in range(1, len(first_row)) if first_row[i - 1] - first_row[i] != 1)
            width = next(falls, len(first_row))
            return len(first_row) // width, width
    table = next(
        (value for key, value in weights.items() if key.endswith("relative_position_bias_table")), None
    )
    positions = weights.get("pos_embed")
    try:
        if table is not None:
            side = (grid_of(len(table) - 3) + 1) // 2
        elif positions is not None:
            side = grid_of(positions.shape[1] - 1)
        else:
            return None
    except ValueError as error:
        raise UserError(
            f"the weights do not say what their patch grid is, and it is not square: {error}"
        ) from None
    return side, side


def add_class_position(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Add a position of zeros for the CLS token where only a square of patches has
    positions (timm's no_embed_class).
    """
    positions = weights.get("pos_embed")
    if positions is None or positions.ndim != 3 or any(key.endswith((TABLE, INDEX)) for key in weights):
        return weights
    if math.isqrt(positions.shape[1]) ** 2 != positions.shape[1]:
        return weights
    return {**weights, "pos_embed": torch.cat((torch.zeros_like(positions[:, :1]), positions), dim=1)}


def adapt_patch_embed(weight: Tensor, shape: Sequence[int]) -> Tensor:
    """A patch embedding (C, channels, height, width) for other channels and patches, as
    timm does it: channels are summed, or repeated and scaled, so that a gray image
    gives the same; patches are resampled as in FlexiViT.

    As it is where timm has no rule: another width, or channels that are neither 1 nor
    3.
    """
    if weight.ndim != 4 or weight.shape[0] != shape[0]:
        return weight
    channels, wanted = weight.shape[1], shape[1]
    if channels == 1:  # timm has rules for three channels alone
        weight = weight.expand(-1, wanted, -1, -1) / wanted
    elif channels == 3:
        weight = adapt_input_conv(wanted, weight)
    return resample_patch_embed(weight, list(shape[2:]))


def lacks_layer_scale(source: dict[str, Tensor], key: str) -> bool:
    """Whether `key` is a layer scale of a block which in `source` has none."""
    block, _, leaf = key.rpartition(".")
    return leaf in ("gamma_1", "gamma_2") and key not in source and f"{block}.attn.qkv.weight" in source


def prepare_source(state_dict: dict[str, Tensor], model: Any) -> dict[str, Tensor]:
    """The entries under our names, with a position for the CLS token if the model's
    shape asks for one.
    """
    source, own = to_our_names(state_dict), model.pos_embed
    same = own is None or "pos_embed" not in source or source["pos_embed"].shape == own.shape
    return source if same else add_class_position(source)


def remap_pretrained(state_dict: dict[str, Tensor], model: Any) -> dict[str, Tensor]:
    """The entries of a checkpoint that `model` can take, under its names and in its
    shapes. Pure: nothing is modified.

    Takes timm's, Hugging Face's and plain ViTs' names too, without the names of
    wrappers in front; copies a shared bias table to every block, resizes tables and
    absolute positions to the model's grid, adapts the patch embedding, gives a layer
    scale of 1 to blocks that were trained without, and leaves out a head of another
    size and all that the model lacks (lm_head, cls_pt_layers). UserError: weights of
    another architecture (as to_our_names).
    """
    wanted, grid = model.state_dict(), model.patch_embed.patch_shape
    source = prepare_source(state_dict, model)
    shared = source.get(SHARED_TABLE)
    if shared is not None:
        for key in wanted:
            if key.endswith(".attn.relative_position_bias_table"):
                source.setdefault(key, shared)
    positions = [key for key in wanted if key == "pos_embed" or key.endswith("relative_position_bias_table")]
    told = any(key.endswith("relative_position_index") for key in source)
    if not told and all(key in source and source[key].shape == wanted[key].shape for key in positions):
        src_grid = grid  # as many rows, and nothing says that they lie otherwise
    else:
        src_grid = infer_patch_grid(source) or grid
    remapped = {}
    for key, value in source.items():
        if key not in wanted or key.endswith("relative_position_index"):
            continue  # the index is the model's own: it depends on the grid alone
        try:
            if src_grid != grid and key.endswith("relative_position_bias_table"):
                value = resize_rel_pos_bias_table(value, grid, src_grid)
            elif src_grid != grid and key == "pos_embed":
                value = resize_pos_embed(value, grid, src_grid)
        except (ValueError, RuntimeError) as error:
            raise UserError(
                f"{key} does not belong to {src_grid[0]} x {src_grid[1]} patches: {error}"
            ) from None
        if key == PATCHES and value.shape != wanted[key].shape:
            value = adapt_patch_embed(value, wanted[key].shape)
        if value.shape == wanted[key].shape:
            remapped[key] = value.clone()
    return remapped | {key: torch.ones_like(wanted[key]) for key in wanted if lacks_layer_scale(source, key)}


def load_remapped(model: Any, weights: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Load what remap_pretrained gives; returns that, and the names that stayed new (an
    index is the model's own).

    Absolute positions that the weights lack start at 0, as relative ones do: so the
    model computes what the weights did.
    """
    fitting = remap_pretrained(weights, model)
    missing = model.load_state_dict(fitting, strict=False).missing_keys
    if "pos_embed" in missing and model.pos_embed is not None:
        nn.init.zeros_(model.pos_embed)
    return fitting, [key for key in missing if not key.endswith("relative_position_index")]


def refuse_misfits(weights: dict[str, Tensor], model: Any, remapped: dict[str, Tensor]) -> None:
    """UserError: blocks, patch embedding or CLS token of `weights`, under our names,
    did not all go into the model, or did not fill it. Positions may differ, and biases
    of query and value may start at 0.
    """
    wanted = model.state_dict()
    for key, value in weights.items():
        backbone = key.startswith(("blocks.", "patch_embed.", "cls_token")) or (
            key == "pos_embed" and key in wanted
        )
        if key in remapped or not backbone or key.endswith(INDEX):
            continue
        if key in wanted:
            if key == PATCHES and value.shape[0] == wanted[key].shape[0]:
                raise UserError(
                    f"it is of images of {value.shape[1]} channels, the model of {wanted[key].shape[1]}, and "
                    f"there is no rule between them: give `in_chans` {value.shape[1]}"
                )
            shapes = [" x ".join(map(str, tensor.shape)) for tensor in (value, wanted[key])]
            raise UserError(
                f"{key} is {shapes[0]} in it and {shapes[1]} in the model: name the `model` that it is of"
            )
        if not key.endswith(TABLE):
            flags = {"_bias": "leave out `disable_qkv_bias`", "gamma_": "give `layer_scale_init_value` 0.1"}
            way_out = next(
                (flag for part, flag in flags.items() if part in key), "name the `model` that it is of"
            )
            raise UserError(f"the model has no {key}: {way_out}")
    optional = ("attn.q_bias", "attn.v_bias", INDEX, *([] if SHARED_TABLE in weights else [TABLE]))
    for key in wanted:
        if (
            key.startswith(("blocks.", "patch_embed.", "cls_token"))
            and key not in remapped
            and not key.endswith(optional)
        ):
            raise UserError(f"it lacks {key}; name the `model` that it is of, or get the file again")


def report_remapping(state_dict: dict[str, Tensor], model: Any, remapped: dict[str, Tensor]) -> list[str]:
    """What remap_pretrained did, one line each: used, resized, adapted, copied to
    blocks, left out, new in the model.
    """
    source = prepare_source(state_dict, model)
    wanted = [key for key in model.state_dict() if not key.endswith("relative_position_index")]
    src_grid, grid = infer_patch_grid(source), model.patch_embed.patch_shape
    resized = [key for key in remapped if key.endswith("relative_position_bias_table") or key == "pos_embed"]
    left_out = [key for key in source if key not in remapped and not key.endswith("relative_position_index")]
    neutral = [key for key in remapped if lacks_layer_scale(source, key)]
    copies = [key for key in remapped if key not in source and key not in neutral]
    lines = [f"used       {len(remapped) - len(neutral)} of the model's {len(wanted)} tensors"]
    if src_grid is not None and src_grid != grid and resized:
        lines.append(
            f"resized    {count(len(resized), 'position table')}: {src_grid[0]} x {src_grid[1]} -> "
            f"{grid[0]} x {grid[1]} patches"
        )
    if PATCHES in remapped and source[PATCHES].shape != remapped[PATCHES].shape:
        lines.append(
            f"adapted    the patch embedding: {describe_patches(source[PATCHES])} -> "
            f"{describe_patches(remapped[PATCHES])}"
        )
    if copies:
        lines.append(f"copied     the shared relative position bias to {len(copies)} blocks")
        left_out = [key for key in left_out if key != SHARED_TABLE]
    if neutral:
        lines.append(
            f"set to 1   {summarize_names(neutral)}: the layer scale, which these blocks were trained without"
        )
    lines.append(f"left out   {summarize_names(left_out)}")
    lines.append(f"new        {summarize_names([key for key in wanted if key not in remapped])}")
    return lines


def describe_patches(patches: Tensor) -> str:
    """A patch embedding's weight (C, channels, height, width) in words."""
    _, channels, height, width = patches.shape
    return f"{count(channels, 'channel')}, patches of {height} x {width}"


def summarize_names(names: list[str]) -> str:
    """`lm_head.weight, lm_head.bias, cls_pt_layers.* (26)`: names of one module
    together where they are many.
    """
    modules: dict[str, list[str]] = {}
    for name in names:
        modules.setdefault(name.split(".")[0], []).append(name)
    shown = [
        f"{module}.* ({len(own)})" if len(own) > 2 else ", ".join(own) for module, own in modules.items()
    ]
    return ", ".join(shown) or "nothing"
