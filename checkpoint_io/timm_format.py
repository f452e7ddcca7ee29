"""BEiT as timm has it: the published names, which are ours too, with fewer parts, and
the config.json of its hub.

Shapes: a table of relative positions is (rows, heads).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from checkpoint_io.weight_formats import (
    INDEX,
    SHARED_TABLE,
    TABLE,
    ConvertedWeights,
    ExternalConfig,
    Preprocessing,
    Weights,
    to_range,
)
from layers.rel_pos_bias import as_pair

TIMM_ARGS = (
    *("img_size", "patch_size", "in_chans", "num_classes", "embed_dim", "depth", "num_heads"),
    *("mlp_ratio", "qkv_bias", "init_values", "use_abs_pos_emb"),
)


def to_timm(weights: Mapping[str, Tensor]) -> ConvertedWeights:
    """Our state dict -> the state dict of timm's `Beit`. A table shared by all blocks
    is added to each block's own.

    timm has no masked images: the mask token and all that predicts codes stay behind.
    """
    model: Weights = {}
    dropped, notes = [], []
    shared = weights.get(SHARED_TABLE)
    for key, value in weights.items():
        if key.endswith(INDEX) or key == SHARED_TABLE:
            continue
        if key.split(".")[0] in ("mask_token", "lm_head", "cls_pt_layers", "cls_pt_norm", "cls_pt_lm_head"):
            dropped.append(key)
        else:
            model[key] = value
    if shared is not None:
        blocks = [
            key.removesuffix("qkv.weight")
            for key in weights
            if key.startswith("blocks.") and key.endswith("qkv.weight")
        ]
        for block in blocks:
            own = weights.get(block + TABLE)
            model[block + TABLE] = shared.clone() if own is None else own + shared
        notes.append(
            f"the relative position bias that all blocks shared was given to each of the {len(blocks)} blocks"
        )
    return ConvertedWeights(model, dropped, notes)


def make_timm_config(
    model: Mapping[str, Any],
    prepared: Preprocessing,
    names: Sequence[str] | None,
    image_range: tuple[float, float] | None = None,
) -> dict[str, Any]:
    """config.json in the form of timm's hub; `model_args` are the arguments of
    timm.models.beit.Beit.

    `model`: the VisionTransformer's arguments. The entry point in `architecture` only
    lends its name: the arguments say all. `image_range` is read by us alone.
    """
    pooling = "avg" if model["use_mean_pooling"] else "token"
    return {
        "architecture": "beitv2_large_patch16_224" if model["depth"] == 24 else "beitv2_base_patch16_224",
        "num_classes": model["num_classes"],
        "num_features": model["embed_dim"],
        "global_pool": pooling,
        **({"label_names": list(names)} if names else {}),
        **({} if image_range is None else {"image_range": list(image_range)}),
        "model_args": {
            **{name: model[name] for name in TIMM_ARGS},
            "global_pool": pooling,
            "use_rel_pos_bias": model["use_rel_pos_bias"] or model["use_shared_rel_pos_bias"],
        },
        "pretrained_cfg": {
            "input_size": [model["in_chans"], *model["img_size"]],
            "fixed_input_size": True,
            "interpolation": "bicubic",
            "crop_pct": prepared.crop_pct,
            "crop_mode": "center",
            "mean": list(prepared.mean),
            "std": list(prepared.std),
            "num_classes": model["num_classes"],
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    }


def read_timm_config(config: Mapping[str, Any]) -> ExternalConfig:
    """`architecture`'s own size counts where `model_args` name no other."""
    settings, facts = config.get("model_args", {}), config.get("pretrained_cfg", config)
    mean, std, crop_pct = (facts.get(key) for key in ("mean", "std", "crop_pct"))
    prepared = Preprocessing(tuple(mean), tuple(std), crop_pct or 1.0) if mean and std else None
    size = settings.get("img_size") or (facts.get("input_size") or (3, 224, 224))[1:]
    names = config.get("label_names") or facts.get("label_names")
    return ExternalConfig(
        settings.get("num_heads"),
        as_pair(size),
        prepared,
        list(names) if isinstance(names, list) else None,
        image_range=to_range(config.get("image_range")),
    )
