"""Transformers from weight files: what a file holds, built from the shapes in it, and a
report of what of it was used.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from torch import Tensor

import modeling_finetune
import modeling_pretrain
from checkpoint_io import remapping, weight_files, weight_source
from checkpoint_io.export import ExportableModel
from checkpoint_io.remapping import summarize_names, to_our_names
from checkpoint_io.weight_formats import INDEX, TABLE, Preprocessing, infer_trunk_parts
from checkpoint_io.weight_source import WeightSource
from errors import ParameterError, UserError
from layers.rel_pos_bias import as_pair
from modeling_finetune import VisionTransformer
from runtime.terminal import log
from transforms import default_crop_pct, normalization_of
from vit_backbone import SIZES, Trunk, Variant


def load_fitting(model: Trunk, weights: dict[str, Tensor], source: str) -> list[str]:
    """Load what fits of `weights` and say in a block of lines what was used; returns
    the names that stayed new.

    UserError when blocks, patch embedding or CLS token do not fit. `source` names the
    weights, as in "`finetune` out/pt.pth".
    """
    weights = to_our_names(weights)
    fitting, missing = remapping.load_remapped(model, weights)
    if not any(key.startswith("blocks.") for key in fitting):
        way_out = (
            "; name the `model` that it is of" if any(key.startswith("blocks.") for key in weights) else ""
        )
        raise UserError(
            f"{source} is {weight_files.describe_kind(weights)}: none of its weights fits this model{way_out}"
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
    """The arguments of the VisionTransformer whose weights these are, without a head,
    read from their shapes.

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
            f"`num_heads` {num_heads}: the file's position tables are of {tables[0].shape[1]} heads; leave "
            "it out"
        )
    heads = num_heads or (tables[0].shape[1] if tables else rows[0].num_heads if rows else None)
    if heads is None or width % heads:
        raise UserError(
            f"how many heads the {width} channels of each layer are cut into is not known: `num_heads` says "
            "it"
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
        **infer_trunk_parts(weights),
        "use_mean_pooling": "fc_norm.weight" in weights,
    }


def open_backbone(
    source: str,
    input_size: int | tuple[int, int] | None = None,
    num_heads: int | None = None,
    origin: str = "`checkpoint`",
    content: WeightSource | None = None,
    in_chans: int | None = None,
) -> tuple[VisionTransformer, dict[str, Any]]:
    """The transformer in a file (path, URL or published name) of pretraining or
    fine-tuning, in eval, without its heads.

    Returns it and the flags it was trained with ({} for published files). `input_size`:
    side or (height, width) in pixels to use it at, the position tables are resized;
    default: its own. `origin`: the parameter that names the source, for messages.
    `content`: of the file, where it has been read already. `in_chans`: of the images;
    default: as it was trained, 3 where that is not known.
    """
    weights, flags, *_ = content or weight_source.read_weights(source, origin=origin)
    try:
        settings = infer_architecture(weights, flags, num_heads)
    except UserError as error:
        raise UserError(f"{origin} {source}: {error}") from None
    if in_chans or flags.get("in_chans") or settings["in_chans"] in (1, 3):
        settings["in_chans"] = in_chans or flags.get("in_chans") or 3  # as the images have, not the file
    if input_size is not None:
        settings["img_size"] = input_size
    try:
        model = VisionTransformer(**settings)
    except ValueError as error:
        raise ParameterError(f"`input_size`: {error}") from None
    missing = load_fitting(model, weights, f"{origin} {source}")
    if not set(missing) <= {"norm.weight", "norm.bias"}:  # which nothing here reads
        raise UserError(f"{origin} {source} is incomplete: it lacks {summarize_names(missing)}")
    return model.eval().requires_grad_(False), flags


def has_cls_head(weights: dict[str, Tensor]) -> bool:
    """Whether these are weights of BEiT v2's pretraining, where the CLS token learns to
    represent the image.
    """
    return any(key.startswith("cls_pt_layers.") for key in weights)


def uses_imagenet_statistics(flags: dict[str, Any], asked: bool, source: str) -> bool:
    """`imagenet_default_mean_and_std` of the training if `flags` tell, else what is
    `asked` for; says when the two differ.
    """
    imagenet = flags.get("imagenet_default_mean_and_std", asked)
    if asked and not imagenet:
        log.warning(
            f"warning: {source} was trained with mean and std 0.5: `imagenet_default_mean_and_std` is left "
            "out"
        )
    return imagenet


# ── Whole models, to be exported ──


@dataclass(frozen=True)
class ModelHints:
    """What the user says about a model besides its file; None: as the file tells."""

    model: str | None = None  # a name of `list_variants`
    num_heads: int | None = None
    input_size: int | tuple[int, int] | None = None
    imagenet_default_mean_and_std: bool = False  # where the file does not tell


def open_model(source: WeightSource, name: str, hints: ModelHints) -> ExportableModel:
    """Build the model that the weights are of and load them: what does not fit together
    is found here. `name` names the source in messages.
    """
    weights, external = source.weights, source.external
    row = SIZES[list_variants()[hints.model].size] if hints.model else None
    heads = hints.num_heads or external.num_heads
    if heads is None and row is not None and not any(key.endswith(TABLE) for key in weights):
        heads = row.num_heads
    try:
        settings = infer_architecture(weights, source.flags, heads)
    except UserError as error:
        raise UserError(f"`checkpoint` {name}: {error}") from None
    if hints.input_size is not None:
        settings["img_size"] = as_pair(hints.input_size)
    del settings["norm_eps"]  # no format that is written has a place for another one
    settings["num_classes"] = len(weights["head.weight"]) if "head.weight" in weights else 0
    vocab_size = len(weights["lm_head.weight"]) if "lm_head.weight" in weights else 0
    variant = find_variant(settings, weights, hints.model, name)
    try:
        model = build_model(settings, vocab_size, weights)
    except ValueError as error:
        raise ParameterError(f"`input_size`: {error}") from None
    dropped, notes = load_model(model, weights, name)
    classes = source.classes
    if classes is not None and len(classes) != settings["num_classes"]:
        classes = None  # of another head than the one in the file
    return ExportableModel(
        source=name,
        name=variant,
        weights=model.state_dict(),
        settings=settings,
        vocab_size=vocab_size,
        prepared=infer_preprocessing(source, settings, hints.imagenet_default_mean_and_std),
        classes=classes,
        flags=source.flags,
        dropped=dropped,
        notes=notes,
    )


def load_model(model: Trunk, weights: dict[str, Tensor], name: str) -> tuple[list[str], list[str]]:
    """Load the weights; returns the keys that are no part of the model, and what else
    there is to say.
    """
    fitting, missing = remapping.load_remapped(model, weights)
    notes = []
    if (
        set(missing) in ({"norm.weight", "norm.bias"}, {"fc_norm.weight", "fc_norm.bias"})
        and "head.weight" not in fitting
    ):
        # a backbone for segmentation
        notes.append("the last norm, which the file lacks, stays as it is built: 1 and 0")
    elif missing:
        raise UserError(f"`checkpoint` {name} is incomplete: it lacks {summarize_names(missing)}")
    try:
        remapping.refuse_misfits(weights, model, fitting)
    except UserError as error:
        raise UserError(f"`checkpoint` {name} is not of one kind of model: {error}") from None
    dropped = [key for key in weights if key not in fitting and not key.endswith(INDEX)]
    before, after = remapping.infer_patch_grid(weights), model.patch_embed.patch_shape
    if before not in (None, after):
        notes.append(
            f"positions were resized from {before[0]} x {before[1]} to {after[0]} x {after[1]} patches"
        )
    return dropped, notes


def build_model(settings: dict[str, Any], vocab_size: int, weights: dict[str, Tensor]) -> Trunk:
    if not vocab_size:
        return modeling_finetune.VisionTransformer(**settings)
    common = {key: value for key, value in settings.items() if key not in ("num_classes", "use_mean_pooling")}
    head_layers = len({key.split(".")[1] for key in weights if key.startswith("cls_pt_layers.")})
    if not head_layers:
        return modeling_pretrain.VisionTransformerForMaskedImageModeling(vocab_size=vocab_size, **common)
    shared = "cls_pt_lm_head.weight" not in weights
    return modeling_pretrain.VisionTransformerForMaskedImageModelingCLS(
        vocab_size=vocab_size, head_layers=head_layers, shared_lm_head=shared, early_layers=1, **common
    )


def build_network(model: ExportableModel) -> VisionTransformer:
    """The exported transformer in eval mode, with its classifier where it has one,
    without the heads of pretraining.
    """
    network = VisionTransformer(**model.settings)
    own = network.state_dict()
    network.load_state_dict({key: value for key, value in model.weights.items() if key in own})
    return network.eval()


def list_variants() -> dict[str, Variant]:
    return {**modeling_pretrain.MODELS, **modeling_finetune.MODELS}


def find_variant(
    settings: dict[str, Any], weights: dict[str, Tensor], asked: str | None, source: str
) -> str | None:
    """Our name of the model: the one of its kind, size and patches whose images are
    nearest in size; None if there is none. UserError: it is not the one that is `asked`
    for.
    """
    make = {key: settings[key] for key in ("embed_dim", "depth", "num_heads", "mlp_ratio")}
    sizes = [size for size, row in SIZES.items() if row._asdict() == make]
    kind = ("lm_head.weight" in weights, "cls_pt_layers.0.norm1.weight" in weights)
    fits = {
        name: abs(variant.img_size - settings["img_size"][0])
        for name, variant in list_variants().items()
        if variant.size in sizes and variant.patch_size == settings["patch_size"]
        if kind == (name in modeling_pretrain.MODELS, name.endswith("_cls_pt"))
    }
    if asked is not None and asked not in fits:
        holds = " or ".join(fits) or "a size that has no name here"
        raise ParameterError(f"`model` {asked} is not what {source} holds: {holds}")
    return asked or min(fits, key=lambda name: fits[name], default=None)


def infer_preprocessing(source: WeightSource, settings: dict[str, Any], imagenet: bool) -> Preprocessing:
    """What the file tells of its images; `imagenet`: whether they have ImageNet's mean
    and std where it does not.
    """
    if source.external.prepared is not None:
        return source.external.prepared
    mean, std = normalization_of({"in_chans": settings["in_chans"], **source.flags}, imagenet)
    return Preprocessing(mean, std, source.flags.get("crop_pct") or default_crop_pct(settings["img_size"]))
