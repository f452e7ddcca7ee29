"""Backbones from weight files: what a file holds, built from the shapes in it, and a
report of what of it was used.
"""

from __future__ import annotations

import argparse
import re
from typing import Any

from torch import Tensor

from checkpoint_io import remapping, weight_files, weight_source
from checkpoint_io.remapping import to_our_names
from checkpoint_io.weight_formats import SHARED_TABLE
from errors import UserError
from layers.rel_pos_bias import as_pair
from modeling_finetune import VisionTransformer
from runtime.distributed import log
from vit_backbone import SIZES, Trunk


def load_fitting(model: Trunk, weights: dict[str, Tensor], source: str) -> list[str]:
    """Load what fits of `weights` and say in a block of lines what was used; returns the names that stayed new.

    UserError when blocks, patch embedding or CLS token do not fit. `source` names the
    weights, as in "--finetune out/pt.pth".
    """
    weights = to_our_names(weights)
    fitting, missing = remapping.load_remapped(model, weights)
    if not any(key.startswith("blocks.") for key in fitting):
        raise UserError(
            f"{source} is {weight_files.describe_kind(weights)}: none of its weights fits this model"
        )
    try:
        remapping.refuse_misfits(weights, model, fitting)
    except UserError as error:
        raise UserError(f"{source} does not fit this model or is incomplete: {error}") from None
    first, *rest = remapping.report_remapping(weights, model, fitting)
    for line in (f"weights    {source}", *(f"           {line}" for line in (first, *rest))):
        log.info(line)
    return missing


def infer_architecture(
    weights: dict[str, Tensor], flags: dict[str, Any], num_heads: int | None = None
) -> dict[str, Any]:
    """The arguments of the VisionTransformer whose weights these are, without a head, read from their shapes.

    `flags`: those of the training run, {} where unknown. Only heads and the grid of a
    model without positions cannot be read from shapes alone: they follow from the
    flags, the table of sizes, or `num_heads`.
    """
    blocks = {int(found.group(1)) for key in weights if (found := re.match(r"blocks\.(\d+)\.", key))}
    patches, mlp = weights.get("patch_embed.proj.weight"), weights.get("blocks.0.mlp.fc1.weight")
    if not blocks or patches is None or mlp is None:
        raise UserError(f"it is {weight_files.describe_kind(weights)}, and no vision transformer")
    if "cls_token" not in weights:
        raise UserError("it is a vision transformer without CLS token, which no model here has")
    if patches.ndim != 4 or patches.shape[2] != patches.shape[3]:
        raise UserError(
            f"its patches are not square ones of images (patch_embed.proj.weight of {tuple(patches.shape)})"
        )
    width, in_chans, patch_size, _ = patches.shape
    tables = [value for key, value in weights.items() if key.endswith("relative_position_bias_table")]
    rows = [size for size in SIZES.values() if (size.embed_dim, size.depth) == (width, len(blocks))]
    if tables and num_heads not in (None, tables[0].shape[1]):
        raise UserError(
            f"--num_heads {num_heads}: the file's position tables are of "
            f"{tables[0].shape[1]} heads; leave it out"
        )
    heads = num_heads or (tables[0].shape[1] if tables else rows[0].num_heads if rows else None)
    if heads is None or width % heads:
        raise UserError(
            f"how many heads the {width} channels of each layer are cut into is not "
            "known: --num_heads says it"
        )
    hidden = len(mlp)
    ratio, grid = hidden / width, remapping.infer_patch_grid(weights)
    size = tuple(side * patch_size for side in grid) if grid else as_pair(flags.get("input_size") or 224)
    return {
        "img_size": size,
        "patch_size": patch_size,
        "in_chans": in_chans,
        "num_classes": 0,
        "embed_dim": width,
        "depth": len(blocks),
        "num_heads": heads,
        "mlp_ratio": ratio if int(width * ratio) == hidden else (hidden + 0.5) / width,  # Block rounds down
        "qkv_bias": "blocks.0.attn.q_bias" in weights,
        "init_values": 0.1 if "blocks.0.gamma_1" in weights else 0,
        "use_abs_pos_emb": "pos_embed" in weights,
        "use_rel_pos_bias": "blocks.0.attn.relative_position_bias_table" in weights,
        "use_shared_rel_pos_bias": SHARED_TABLE in weights,
        "use_mean_pooling": "fc_norm.weight" in weights,
    }


def open_backbone(
    source: str,
    input_size: int | tuple[int, int] | None = None,
    num_heads: int | None = None,
    flag: str = "--checkpoint",
    content: weight_source.Source | None = None,
) -> tuple[VisionTransformer, dict[str, Any]]:
    """The transformer in a file (path, URL or published name) of pretraining or
    fine-tuning, in eval, without its heads.

    Returns it and the flags it was trained with ({} for published files). `input_size`:
    side or (height, width) in pixels to use it at, the position tables are resized;
    default: its own. `flag` names the source in messages. `content`: of the file, where
    it has been read already.
    """
    weights, flags, *_ = content or weight_source.read_weights(source, flag=flag)
    try:
        settings = infer_architecture(weights, flags, num_heads)
    except UserError as error:
        raise UserError(f"{flag} {source}: {error}") from None
    settings["in_chans"] = 3  # as the images have, whatever the file's had
    if input_size is not None:
        settings["img_size"] = input_size
    try:
        model = VisionTransformer(**settings)
    except ValueError as error:
        raise UserError(f"--input_size: {error}") from None
    missing = load_fitting(model, weights, f"{flag} {source}")
    if not set(missing) <= {"norm.weight", "norm.bias"}:  # which nothing here reads
        raise UserError(f"{flag} {source} is incomplete: it lacks {remapping.summarize_names(missing)}")
    return model.eval().requires_grad_(False), flags


def has_cls_head(weights: dict[str, Tensor]) -> bool:
    """Whether they are of BEiT v2's pretraining, where the CLS token learns to stand for the image."""
    return any(key.startswith("cls_pt_layers.") for key in weights)


def uses_imagenet_statistics(flags: dict[str, Any], args: argparse.Namespace, source: str) -> bool:
    """--imagenet_default_mean_and_std of the training if `flags` tell, else what `args`
    choose; says when the two differ.
    """
    imagenet = flags.get("imagenet_default_mean_and_std", args.imagenet_default_mean_and_std)
    if args.imagenet_default_mean_and_std and not imagenet:
        log.warning(
            f"warning: {source} was trained with mean and std 0.5: "
            "--imagenet_default_mean_and_std is left out"
        )
    return imagenet
