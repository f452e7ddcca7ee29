"""VQ-KD: the visual tokenizer of BEiT v2 (section 3.1), trained to reconstruct a frozen
teacher's features. Above 300 lines, so that the whole tokenizer is in one file.

Shapes: B batch, h x w grid of N patches, C width, K codes, D code dim, F teacher dim.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from checkpoint_io.tokenizer_weights import (
    TokenizerContent,
    check_codebook,
    count_blocks,
    infer_decoder_depth,
    infer_in_chans,
    load_tokenizer_weights,
    read_tokenizer,
)
from checkpoint_io.weight_formats import infer_trunk_parts
from data_pipeline.pixel_format import PixelFormat
from errors import ParameterError, UserError, pick
from layers.init_weights import init_linear_and_norm
from layers.rel_pos_bias import grid_of
from layers.token_subset import MaskedPositions, TokenSubset
from modeling_finetune import VisionTransformer
from norm_ema_quantizer import NormEMAVectorQuantizer
from transforms import IMAGENET_MEAN, IMAGENET_STD, normalization_of
from vit_backbone import SIZES
from vqkd_teachers import TEACHER_DIMS

INPUT_MEAN_STD = {
    "default": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),  # [0, 1] -> [-1, 1]
    "imagenet_norm": (IMAGENET_MEAN, IMAGENET_STD),
}


class VQKD(nn.Module):
    """Encoder -> unit codes of dim D -> quantizer -> decoder -> the teacher's feature
    of every patch.

    Args:
        encoder_config, decoder_config: arguments of VisionTransformer. The decoder's
            image is the grid of codes (img_size = grid side, patch_size 1, in_chans =
            embed_dim).
        n_embed, embed_dim: K and D. decoder_out_dim: F.
        teacher: frozen module with `targets(x) -> (B, N, F)`, which `forward` asks
            where it is given no targets. It is not part of this module: neither
            parameters nor state dict hold it, and `.to()` does not move it.
        mean_std: mean and std of each channel, by which images are normalized, in place
            of what `process_type` says.
    """

    input_mean: Tensor
    input_std: Tensor
    target_mean: Tensor
    target_std: Tensor
    image_range: Sequence[float] | None = None  # of the images it was trained on; None: by the files' type

    def __init__(
        self,
        encoder_config: dict[str, Any],
        decoder_config: dict[str, Any],
        n_embed: int = 8192,
        embed_dim: int = 32,
        decay: float = 0.99,
        process_type: str = "default",
        quantize_kmeans_init: bool = True,
        decoder_out_dim: int = 512,
        teacher: Any = None,
        mean_std: tuple[Sequence[float], Sequence[float]] | None = None,
    ) -> None:
        super().__init__()
        decoder_config = {**decoder_config, "in_chans": embed_dim}
        self.encoder = VisionTransformer(**encoder_config)
        self.decoder = VisionTransformer(**decoder_config)
        if self.encoder.patch_embed.num_patches != self.decoder.patch_embed.num_patches:
            raise ValueError("the decoder's img_size must be the encoder's grid")
        self.quantize = NormEMAVectorQuantizer(
            n_embed, embed_dim, beta=1.0, decay=decay, kmeans_init=quantize_kmeans_init
        )
        self.encode_task_layer = task_layer(self.encoder.embed_dim, embed_dim)
        self.decode_task_layer = task_layer(self.decoder.embed_dim, decoder_out_dim)
        in_chans = self.encoder.patch_embed.proj.in_channels
        mean, std = mean_std or input_mean_std(process_type, in_chans)
        self.register_buffer("input_mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("input_std", torch.tensor(std).view(1, -1, 1, 1), persistent=False)
        self.teacher_targets: Callable[[Tensor], Tensor] | None = None if teacher is None else teacher.targets
        self.standardize = teacher is not None and teacher.standardize
        if self.standardize:
            self.register_buffer("target_mean", torch.zeros(decoder_out_dim))
            self.register_buffer("target_std", torch.ones(decoder_out_dim))

    @property
    def pixels(self) -> PixelFormat:
        """Of the images that it encodes."""
        in_chans = self.encoder.patch_embed.proj.in_channels
        return PixelFormat.of_flags({"in_chans": in_chans, "image_range": self.image_range})

    # ── encoding ──

    def pre_process(self, x: Tensor) -> Tensor:
        """Images (B, 3, height, width) in [0, 1] -> what the encoder sees."""
        return (x - self.input_mean) / self.input_std

    def features(self, x: Tensor, subset: TokenSubset | None = None) -> Tensor:
        """Pre-processed images -> code vectors before normalization (B, N, D), fp32
        also under autocast.

        `subset`: of these patches alone, (B, R, D).
        """
        tokens = self.encoder.forward_features(x, return_patch_tokens=True, subset=subset)
        with torch.autocast(x.device.type, enabled=False):
            return self.encode_task_layer(tokens.float())

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Pre-processed images -> (z_q (B, D, h, w), indices (B * N,), commitment loss
        ()).
        """
        height, width = self.encoder.patch_embed.patch_shape
        z = rearrange(self.features(x), "b (h w) d -> b d h w", h=height, w=width)
        z_q, loss, indices = self.quantize(z)
        return z_q, indices, loss

    @torch.no_grad()
    def get_codebook_indices(
        self, x: Tensor, bool_masked_pos: Tensor | MaskedPositions | None = None
    ) -> Tensor:
        """Images (B, 3, height, width) in [0, 1] -> code of every patch (B, N) int64.
        Writes no state.

        With a mask (B, N), best on the host, or its positions: the codes of its M
        patches alone, (M,), in row-major order.
        """
        masked = bool_masked_pos
        if isinstance(masked, Tensor):
            masked = MaskedPositions.of(masked, x.device)
        subset = None if masked is None else masked.subset(with_cls=False)
        features = F.normalize(self.features(self.pre_process(x), subset), dim=-1)
        codes = self.quantize.nearest(features.flatten(0, 1))
        if subset is not None:
            return codes
        return codes.view(x.shape[0], -1) if masked is None else masked.select(codes)

    def drop_decoder(self) -> None:
        """Leave what gives codes, and free what training alone needs: decode and forward
        are gone.
        """
        del self.decoder, self.decode_task_layer

    # ── decoding and distillation ──

    def decode(self, z_q: Tensor) -> Tensor:
        """Codes (B, D, h, w) -> predicted teacher features (B, N, F)."""
        return self.decode_task_layer(self.decoder.forward_features(z_q, return_patch_tokens=True))

    def forward(self, x: Tensor, targets: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """Images (B, 3, height, width) in [0, 1] and the teacher's features of them
        (B, N, F) -> (loss (), parts of it for the log).
        """
        if targets is None:
            if self.teacher_targets is None:
                raise UserError(
                    "this tokenizer was built without a teacher: it encodes, it cannot be trained"
                )
            targets = self.teacher_targets(x)
        loss, parts, _ = self.distill(x, targets)
        return loss, parts

    def distill(self, x: Tensor, targets: Tensor) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """As forward, and the codes (B * N,) that the images were given."""
        if self.standardize:
            targets = (targets - self.target_mean) / self.target_std
        z_q, indices, quant_loss = self.encode(self.pre_process(x))
        rec_loss = (1 - F.cosine_similarity(self.decode(z_q).float(), targets, dim=-1)).mean()
        loss = quant_loss + rec_loss
        return loss, {"quant_loss": quant_loss.detach(), "rec_loss": rec_loss.detach()}, indices

    def no_weight_decay(self) -> set[str]:
        names = {f"encoder.{name}" for name in self.encoder.no_weight_decay()}
        return names | {f"decoder.{name}" for name in self.decoder.no_weight_decay()}


def input_mean_std(process_type: str, in_chans: int) -> tuple[Sequence[float], Sequence[float]]:
    mean, std = pick(INPUT_MEAN_STD, process_type, "`process_type`")
    if in_chans == 3:
        return mean, std
    if process_type != "default":
        raise ParameterError(
            f"`process_type` {process_type} is of RGB, `in_chans` is {in_chans}: leave it out, or give "
            "`mean_std`"
        )
    return mean[:1] * in_chans, std[:1] * in_chans


def task_layer(width: int, out: int) -> nn.Sequential:
    layer = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, out))
    return layer.apply(functools.partial(init_linear_and_norm, std=0.02, cut=2.0))


# ── Variants ──


@dataclass(frozen=True)
class TokenizerVariant:
    """One row of the table of tokenizers. Calling it builds the tokenizer."""

    size: str  # encoder row of SIZES
    decoder_depth: int
    decoder_heads: int
    teacher: str  # the default one: it decides the decoder's output width
    img_size: int = 224
    encoder_depth: int | None = None  # of this table alone; None: of the row of SIZES

    @property
    def name(self) -> str:
        """The published one."""
        decoder = f"{self.decoder_depth}x{SIZES[self.size].embed_dim}x{self.decoder_heads}"
        return f"vqkd_encoder_{self.size}_decoder_{decoder}_{self.teacher}"

    @property
    def encoder_shape(self) -> tuple[int, int]:
        """Width and depth."""
        size = SIZES[self.size]
        return size.embed_dim, self.encoder_depth or size.depth

    def __call__(
        self,
        pretrained: bool = False,
        pretrained_weight: str | None = None,
        as_tokenizer: bool = False,
        as_tokenzer: bool = False,  # the published spelling
        img_size: int | None = None,
        n_code: int = 8192,
        code_dim: int = 32,
        teacher: Any = None,
        decoder_out_dim: int | None = None,
        decoder_depth: int | None = None,
        in_chans: int | None = None,
        encoder_parts: dict[str, Any] | None = None,
        content: TokenizerContent | None = None,
        **options: Any,
    ) -> VQKD:
        """A tokenizer to train, or with as_tokenizer a frozen one in eval mode: with
        the weights of `pretrained_weight` if `pretrained`.

        Args:
            img_size: default: the row's.
            decoder_depth: blocks of the decoder; default: the weights', else the row's.
            in_chans: channels of the images; default: the weights', else 3.
            encoder_parts: as infer_trunk_parts, of weights that the encoder will take; default: the file's,
                else absolute positions alone.
            content: of the file `pretrained_weight`, where it has been read already.
            options: more arguments of VQKD.
        """
        frozen, weights, flags = as_tokenizer or as_tokenzer, None, dict[str, Any]()
        source = str(pretrained_weight or self.name)
        if pretrained:
            weights, flags = content or read_tokenizer(source, f"`tokenizer_weight` {source}")
            check_codebook(weights, n_code, code_dim, source)
            decoder_out_dim = len(weights["decode_task_layer.2.bias"])  # whichever teacher it had
            decoder_depth = infer_decoder_depth(weights, decoder_depth, source)
            encoder_parts = infer_trunk_parts(weights, prefix="encoder.")
            options.setdefault("process_type", flags.get("process_type", "default"))
            in_chans = infer_in_chans(weights, in_chans, source)
            if flags.get("mean_std"):
                options.setdefault("mean_std", normalization_of(flags))
        if decoder_out_dim is None:
            decoder_out_dim = TEACHER_DIMS[self.teacher] if teacher is None else teacher.dim
        width, depth = self.encoder_shape
        grid, own = (img_size or self.img_size) // PATCH_SIZE, {"num_classes": 0, "embed_dim": width}
        encoder = {"img_size": grid * PATCH_SIZE, "patch_size": PATCH_SIZE, "depth": depth, **own}
        encoder["in_chans"] = in_chans or 3
        encoder |= {**(encoder_parts or {}), "use_abs_pos_emb": True}  # by which its file tells its grid
        decoder = {"img_size": grid, "patch_size": 1, "depth": decoder_depth or self.decoder_depth, **own}
        model = VQKD(
            encoder | {"num_heads": SIZES[self.size].num_heads},
            decoder | {"num_heads": self.decoder_heads},
            n_code,
            code_dim,
            decoder_out_dim=decoder_out_dim,
            teacher=teacher,
            **{"quantize_kmeans_init": not frozen, **options},
        )
        if weights is not None:
            load_tokenizer_weights(model, weights, infer_settings(weights, {}, source), source)
            model.image_range = flags.get("image_range")
        return model.eval().requires_grad_(False) if frozen else model


PATCH_SIZE = 16
vqkd_encoder_base_decoder_1x768x12_clip = TokenizerVariant("base", 1, 12, "clip")
vqkd_encoder_base_decoder_3x768x12_clip = TokenizerVariant("base", 3, 12, "clip")
vqkd_encoder_base_decoder_1x768x12_dino = TokenizerVariant("base", 1, 12, "dino")
vqkd_encoder_small_decoder_1x384x6_clip = TokenizerVariant("small", 1, 6, "clip")
vqkd_encoder_tiny_decoder_1x192x3_clip = TokenizerVariant("tiny", 1, 3, "clip")
vqkd_encoder_mini_decoder_1x64x2_hog = TokenizerVariant("mini", 1, 2, "hog", img_size=96, encoder_depth=4)
vqkd_encoder_demo_decoder_1x128x4_hog = TokenizerVariant("demo", 1, 4, "hog", img_size=128, encoder_depth=4)
MODELS = {name: value for name, value in globals().items() if isinstance(value, TokenizerVariant)}


def default_teacher(name: str) -> str:
    """The teacher in a tokenizer's name."""
    return pick(MODELS, name, "tokenizer").teacher


def create_model(name: str, **options: Any) -> VQKD:
    return pick(MODELS, name, "tokenizer")(**options)


def open_tokenizer(source: str, flag: str = "`tokenizer_weight`") -> tuple[VQKD, dict[str, Any]]:
    """The frozen tokenizer in a file (path, URL or published name), built from what the
    file says of itself.

    Returns it and the flags it was trained with ({} for published files). `flag` names
    the source in messages.
    """
    content = read_tokenizer(source, f"{flag} {source}")
    options: dict[str, Any] = {"pretrained": True, "pretrained_weight": source, "content": content}
    settings = infer_settings(*content, f"{flag} {source}")
    return create_model(**settings, **options, as_tokenizer=True), content[1]


def infer_settings(weights: dict[str, Tensor], flags: dict[str, Any], source: str) -> dict[str, Any]:
    """The arguments of create_model for the tokenizer whose weights these are. `source`
    is for messages.
    """
    codebook, positions = weights["quantize.embedding.weight"], weights["encoder.pos_embed"]
    shape = (positions.shape[-1], count_blocks(weights, "encoder"))
    fitting = [name for name, variant in MODELS.items() if variant.encoder_shape == shape]
    name = flags["model"] if flags.get("model") in MODELS else next(iter(fitting), None)
    if name is None:
        raise UserError(
            f"{source}: width and depth of its encoder, {shape}, are those of none of {', '.join(MODELS)}"
        )
    side = grid_of(positions.shape[1] - 1) * PATCH_SIZE
    codes = {"n_code": codebook.shape[0], "code_dim": codebook.shape[1]}
    parts = {"decoder_depth": count_blocks(weights, "decoder"), "in_chans": infer_in_chans(weights)}
    return {"name": name, "img_size": side, **codes, **parts}
