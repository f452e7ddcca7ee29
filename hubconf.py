"""The networks in Python, without flags: torch.hub.load(repo, "backbone", "ft.pth",
source="local").

`weights` is a path, a URL, a published name or an id of Hugging Face's hub. What comes
back is in eval mode and has `preprocessing`: mean, std and crop_pct of its images, and
`view`, which reads an image file as it was trained: network.view(network.view.load(path)). No
module named `datasets` or `utils` is imported, so that Hugging Face's and a user's own
work beside it. docs/python.md has examples.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import modeling_dvae
import modeling_finetune
import modeling_vqkd
import pretrained
import vit_backbone
from checkpoint_io import published, weight_source
from checkpoint_io.weight_formats import Preprocessing
from data_pipeline.pixel_format import PixelFormat
from errors import ParameterError, UserError
from evaluation import frozen_backbone
from segmentation import trained_segmenter
from transforms import default_crop_pct, eval_view, normalization_of

dependencies = ["torch", "torchvision", "timm", "einops", "safetensors", "numpy", "PIL", "huggingface_hub"]

# ── By kind ──


def backbone(
    weights: str, input_size: int | tuple[int, int] | None = None, num_heads: int | None = None
) -> Any:
    """The transformer in a file of pretraining or fine-tuning, without its heads:
    forward_features(x), get_intermediate_layers(x), attention_maps(x).

    Args:
        weights: also `timm:<name>`, any network of timm.
        input_size: Pixels, a side or (height, width); default: the file's own.
        num_heads: For files of an unknown size without position bias.
    """
    opened = frozen_backbone.open_frozen(weights, input_size, num_heads, origin="`weights`")
    crop_pct = opened.crop_pct or default_crop_pct(opened.img_size)
    prepared = Preprocessing(tuple(opened.mean), tuple(opened.std), crop_pct)
    return _with_view(opened.model, opened.img_size, prepared, opened.pixels, opened.interpolation)


def classifier(weights: str) -> modeling_finetune.VisionTransformer:
    """The classifier in a file: normalized images (B, C, H, W) -> logits (B, classes).
    `classes`: their names, None where the file does not tell.
    """
    model = pretrained.open_model(
        weight_source.read_weights(weights, origin="`weights`"), weights, pretrained.ModelHints()
    )
    if not model.settings["num_classes"]:
        raise ParameterError(f"`weights` {weights} holds no classifier: open it as a backbone")
    network: Any = pretrained.build_network(model)
    network.classes = model.classes
    _with_view(network, model.settings["img_size"], model.prepared, model.pixels)
    return network.requires_grad_(False)


def tokenizer(weights: str) -> Any:
    """The visual tokenizer in a file, VQ-KD's, or `dall_e_encoder`:
    get_codebook_indices(x) gives the codes (B, N) of images in [0, 1].
    """
    if weights == "dall_e_encoder":
        return _dall_e()
    network: Any = modeling_vqkd.open_tokenizer(weights, "`weights`")[0]
    network.view = eval_view(network.encoder.patch_embed.img_size, pixels=network.pixels)
    return network


def segmenter(weights: str) -> Any:
    """The segmentation model in a file: normalized images -> logits of each class.
    `classes` as in `classifier`. Its view is a square of the size of the crops.
    """
    content = trained_segmenter.read_segmenter(weights, "`weights`")
    network: Any = trained_segmenter.build_segmenter(content, f"`weights` {weights}")
    network.classes = content.classes
    flags = content.flags | {"in_chans": network.backbone.patch_embed.proj.in_channels}
    prepared = Preprocessing(*normalization_of(flags), 1.0)
    size = network.backbone.patch_embed.img_size
    return _with_view(network, size, prepared, PixelFormat.of_flags(flags)).requires_grad_(False)


def _with_view(
    network: Any,
    size: tuple[int, int],
    prepared: Preprocessing,
    pixels: PixelFormat,
    interpolation: str = "bicubic",
) -> Any:
    """The network, told how its images are read and prepared."""
    network.preprocessing = prepared
    network.view = eval_view(size, prepared.crop_pct, interpolation, prepared.mean, prepared.std, pixels)
    return network


def _dall_e(weights: str | None = None) -> Any:
    network: Any = modeling_dvae.load_dall_e_encoder(weights)
    network.view = eval_view(modeling_dvae.DALL_E_SIZE)
    return network


# ── By size ──


def _of_size(name: str, init_values: float) -> Callable[..., modeling_finetune.VisionTransformer]:
    def build(weights: str | None = None, **options: Any) -> modeling_finetune.VisionTransformer:
        if weights is None:
            recipe = {"use_abs_pos_emb": False, "use_rel_pos_bias": True, "init_values": init_values}
            return modeling_finetune.create_model(name, **recipe | options)
        try:
            network: Any = classifier(weights)
        except ParameterError:
            network = backbone(weights, **options)
        size = vit_backbone.SIZES[modeling_finetune.MODELS[name].size]
        if (network.embed_dim, network.get_num_layers()) != (size.embed_dim, size.depth):
            raise ParameterError(
                f"`weights` {weights} is {network.embed_dim} wide and {network.get_num_layers()} deep, "
                f"{name} is {size.embed_dim} and {size.depth}"
            )
        return network

    build.__doc__ = (
        f"{name}: with `weights` their classifier, or backbone where they have none; without, random "
        "weights in the recipe's shape, and `options` are arguments of VisionTransformer."
    )
    return build


beit_small_patch16_224 = _of_size("beit_small_patch16_224", 0.1)
beit_base_patch16_224 = beitv2_base_patch16_224 = _of_size("beit_base_patch16_224", 0.1)
beit_base_patch16_384 = _of_size("beit_base_patch16_384", 0.1)
beit_large_patch16_224 = beitv2_large_patch16_224 = _of_size("beit_large_patch16_224", 1e-5)
beit_large_patch16_384 = _of_size("beit_large_patch16_384", 1e-5)
beit_large_patch16_512 = _of_size("beit_large_patch16_512", 1e-5)

# ── By published name ──

OPENED_BY: dict[str, Callable[..., Any]] = {
    "tokenizer": tokenizer,
    "tokenizer-v1": _dall_e,
    "pretrained": backbone,
    "intermediate": classifier,
    "finetuned": classifier,
    "segmentation": segmenter,
}


def _published(name: str) -> Callable[..., Any]:
    entry = published.ENTRIES[name]

    def load(pretrained: bool = True, weights: str | None = None, **options: Any) -> Any:
        if not pretrained:
            raise UserError(
                f"{name} is the name of weights: for random ones name a size, beit_base_patch16_224"
            )
        return OPENED_BY[entry.kind](weights or name, **options)

    load.__doc__ = f"The published weights {name} ({entry.kind}); `weights`: a copy of the file."
    return load


vqkd_encoder_base_decoder_1x768x12_clip = _published("vqkd_encoder_base_decoder_1x768x12_clip")
vqkd_encoder_base_decoder_3x768x12_clip = _published("vqkd_encoder_base_decoder_3x768x12_clip")
vqkd_encoder_base_decoder_1x768x12_dino = _published("vqkd_encoder_base_decoder_1x768x12_dino")
beitv2_base_patch16_224_pt1k_300e = _published("beitv2_base_patch16_224_pt1k_300e")
beitv2_base_patch16_224_pt1k = _published("beitv2_base_patch16_224_pt1k")
beitv2_large_patch16_224_pt1k_300e = _published("beitv2_large_patch16_224_pt1k_300e")
beitv2_large_patch16_224_pt1k = _published("beitv2_large_patch16_224_pt1k")
beitv2_base_patch16_224_pt1k_ft21k = _published("beitv2_base_patch16_224_pt1k_ft21k")
beitv2_large_patch16_224_pt1k_ft21k = _published("beitv2_large_patch16_224_pt1k_ft21k")
beitv2_base_patch16_224_pt1k_300e_ft1k = _published("beitv2_base_patch16_224_pt1k_300e_ft1k")
beitv2_base_patch16_224_pt1k_ft1k = _published("beitv2_base_patch16_224_pt1k_ft1k")
beitv2_base_patch16_224_pt1k_ft21kto1k = _published("beitv2_base_patch16_224_pt1k_ft21kto1k")
beitv2_large_patch16_224_pt1k_300e_ft1k = _published("beitv2_large_patch16_224_pt1k_300e_ft1k")
beitv2_large_patch16_224_pt1k_ft1k = _published("beitv2_large_patch16_224_pt1k_ft1k")
beitv2_large_patch16_224_pt1k_ft21kto1k = _published("beitv2_large_patch16_224_pt1k_ft21kto1k")
beitv2_base_patch16_224_pt1k_ftade20k = _published("beitv2_base_patch16_224_pt1k_ftade20k")
beitv2_base_patch16_224_pt1k_ft21ktoade20k = _published("beitv2_base_patch16_224_pt1k_ft21ktoade20k")
beitv2_large_patch16_224_pt1k_ftade20k = _published("beitv2_large_patch16_224_pt1k_ftade20k")
beitv2_large_patch16_224_pt1k_ft21ktoade20k = _published("beitv2_large_patch16_224_pt1k_ft21ktoade20k")
beit_base_patch16_224_pt22k = _published("beit_base_patch16_224_pt22k")
beit_large_patch16_224_pt22k = _published("beit_large_patch16_224_pt22k")
beit_base_patch16_224_pt22k_ft22k = _published("beit_base_patch16_224_pt22k_ft22k")
beit_large_patch16_224_pt22k_ft22k = _published("beit_large_patch16_224_pt22k_ft22k")
beit_base_patch16_224_pt22k_ft1k = _published("beit_base_patch16_224_pt22k_ft1k")
beit_base_patch16_224_pt22k_ft22kto1k = _published("beit_base_patch16_224_pt22k_ft22kto1k")
beit_base_patch16_384_pt22k_ft22kto1k = _published("beit_base_patch16_384_pt22k_ft22kto1k")
beit_large_patch16_224_pt22k_ft22kto1k = _published("beit_large_patch16_224_pt22k_ft22kto1k")
beit_large_patch16_384_pt22k_ft22kto1k = _published("beit_large_patch16_384_pt22k_ft22kto1k")
beit_large_patch16_512_pt22k_ft22kto1k = _published("beit_large_patch16_512_pt22k_ft22kto1k")
dall_e_encoder = _published("dall_e_encoder")
