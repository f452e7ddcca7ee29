"""The textbook way, with which benchmark.py compares ours: every formula as in the
papers.

Explicit softmax(q k^T + bias) v, every token through every block, distances and a
one-hot matrix in the quantizer, one PIL operation after the other for the views. The
models hold a copy of our modules, with the same weights, but use none of our forward
passes.

Shapes: B batch, N patches, T = 1 + N tokens, C width, H heads, D = C / H, M masked
patches, K codes, d code dim.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torchvision import transforms as T
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as TF

from data_pipeline.image_formats import open_image
from modeling_finetune import VisionTransformer
from modeling_vqkd import VQKD
from norm_ema_quantizer import NormEMAVectorQuantizer
from vit_backbone import Attention, Block, Trunk
from vqkd_teachers import Teacher


def lookup_bias(owner: Any) -> Tensor:
    """The bias (H, T, T) of a module that owns a table."""
    table, index = owner.relative_position_bias_table, owner.relative_position_index
    return table[index.view(-1)].view(*index.shape, -1).permute(2, 0, 1).contiguous()


def attention(layer: Attention, x: Tensor, shared: Tensor | None) -> Tensor:
    """(B, T, C) -> (B, T, C)"""
    b, t, c = x.shape
    bias = None
    if layer.q_bias is not None and layer.v_bias is not None:
        bias = torch.cat((layer.q_bias, torch.zeros_like(layer.v_bias), layer.v_bias))
    qkv = F.linear(x, layer.qkv.weight, bias).reshape(b, t, 3, layer.num_heads, -1).permute(2, 0, 3, 1, 4)
    q, k, v = qkv[0], qkv[1], qkv[2]
    scores = (q * layer.scale) @ k.transpose(-2, -1)
    if layer.relative_position_bias_table is not None:
        scores = scores + lookup_bias(layer).unsqueeze(0)
    if shared is not None:
        scores = scores + shared
    out = scores.softmax(dim=-1) @ v
    return layer.proj(out.transpose(1, 2).reshape(b, t, c))


def block(layer: Block, x: Tensor, shared: Tensor | None) -> Tensor:
    attended = attention(layer.attn, layer.norm1(x), shared)
    x = x + layer.drop_path(attended if layer.gamma_1 is None else layer.gamma_1 * attended)
    hidden = layer.mlp.fc2(F.gelu(layer.mlp.fc1(layer.norm2(x))))
    return x + layer.drop_path(hidden if layer.gamma_2 is None else layer.gamma_2 * hidden)


def embed(trunk: Trunk, x: Tensor, mask: Tensor | None = None) -> Tensor:
    """Images, mask (B, N) -> tokens (B, T, C)"""
    tokens = trunk.patch_embed.proj(x).flatten(2).transpose(1, 2)
    if mask is not None:
        w = mask.unsqueeze(-1).type_as(trunk.mask_token)
        tokens = tokens * (1 - w) + trunk.mask_token * w
    tokens = torch.cat((trunk.cls_token.expand(len(tokens), -1, -1), tokens), dim=1)
    return tokens if trunk.pos_embed is None else tokens + trunk.pos_embed


def encode_tokens(model: Any, x: Tensor) -> Tensor:
    """Images, a VisionTransformer -> all tokens after its last block, (B, T, C)"""
    tokens = embed(model, x)
    shared = None if model.rel_pos_bias is None else lookup_bias(model.rel_pos_bias)
    for layer in model.blocks:
        tokens = block(layer, tokens, shared)
    return model.norm(tokens)


class PlainClassifier(nn.Module):
    """A copy of our classifier with mean pooling."""

    def __init__(self, model: VisionTransformer) -> None:
        super().__init__()
        self.model: Any = copy.deepcopy(model)

    def forward(self, x: Tensor) -> Tensor:
        """Images -> logits (B, classes)"""
        return self.model.head(self.model.fc_norm(encode_tokens(self.model, x)[:, 1:].mean(dim=1)))


class PlainPretraining(nn.Module):
    """A copy of our VisionTransformerForMaskedImageModelingCLS."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model: Any = copy.deepcopy(model)

    def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Images, mask (B, N) -> logits of the masked patches (M, K) by the main and by
        the CLS branch
        """
        model = self.model
        tokens, shared = embed(model, x, mask), None
        if model.rel_pos_bias is not None:
            shared = lookup_bias(model.rel_pos_bias)
        early = tokens
        for number, layer in enumerate(model.blocks, start=1):
            tokens = block(layer, tokens, shared)
            if number == model.early_layers:
                early = tokens[:, 1:]
        bridged = torch.cat((tokens[:, :1], early), dim=1)
        for layer in model.cls_pt_layers:
            bridged = block(layer, bridged, shared)
        norm, head = (
            (model.norm, model.lm_head) if model.shared_lm_head else (model.cls_pt_norm, model.cls_pt_lm_head)
        )
        main, cls = model.norm(tokens)[:, 1:], norm(bridged)[:, 1:]
        return model.lm_head(main[mask]), head(cls[mask])


def distances(features: Tensor, codes: Tensor) -> Tensor:
    """Squared distances of features (M, d) to codes (K, d): (M, K)"""
    return features.pow(2).sum(1, keepdim=True) + codes.pow(2).sum(1) - 2 * features @ codes.t()


class PlainQuantizer(nn.Module):
    """A copy of our quantizer's codebook; assignment as a one-hot matrix (M, K)."""

    def __init__(self, quantizer: NormEMAVectorQuantizer) -> None:
        super().__init__()
        self.quantizer = copy.deepcopy(quantizer)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, d, h, w) -> codes (B, d, h, w), loss (), indices (B * h * w,)"""
        q = self.quantizer
        codes = q.embedding.weight
        with torch.autocast(z.device.type, enabled=False):
            z = F.normalize(z.float().permute(0, 2, 3, 1), dim=-1)
            flat = z.reshape(-1, z.shape[-1])
            indices = distances(flat.detach(), codes).argmin(dim=1)
            chosen = F.embedding(indices, codes).view(z.shape)
            if self.training:
                self.update(flat.detach(), F.one_hot(indices, q.num_tokens).type(z.dtype))
            loss = q.beta * F.mse_loss(chosen, z)
            chosen = z + (chosen - z).detach()
        return chosen.permute(0, 3, 1, 2), loss, indices

    @torch.no_grad()
    def update(self, flat: Tensor, one_hot: Tensor) -> None:
        q = self.quantizer
        codes, counts = q.embedding.weight, one_hot.sum(dim=0)
        q.cluster_size.mul_(q.decay).add_(counts, alpha=1 - q.decay)
        means = F.normalize((one_hot.t() @ flat) / counts.clamp(min=1)[:, None], dim=-1)
        means = torch.where(counts[:, None] > 0, means, codes)
        q.embedding.weight = F.normalize(codes * q.decay + means * (1 - q.decay), dim=-1)


class PlainVQKD(nn.Module):
    """A copy of our tokenizer and of its frozen teacher."""

    def __init__(self, model: VQKD, teacher: Teacher | None = None) -> None:
        super().__init__()
        self.model: Any = copy.deepcopy(model)
        self.model.teacher_targets = None
        self.quantize = PlainQuantizer(model.quantize)
        del self.model.quantize
        self.teacher: Any = copy.deepcopy(teacher)

    def code_vectors(self, x: Tensor) -> Tensor:
        """Images in [0, 1] -> (B, N, d), not normalized"""
        model = self.model
        patches = model.encoder.fc_norm(
            encode_tokens(model.encoder, (x - model.input_mean) / model.input_std)[:, 1:]
        )
        with torch.autocast(x.device.type, enabled=False):
            return model.encode_task_layer(patches.float())

    @torch.no_grad()
    def codes_of(self, x: Tensor) -> Tensor:
        """Images in [0, 1] -> code of every patch (B, N)"""
        flat = F.normalize(self.code_vectors(x), dim=-1).flatten(0, 1)
        return distances(flat, self.quantize.quantizer.embedding.weight).argmin(dim=1).view(len(x), -1)

    def forward(self, x: Tensor, mark: Callable[[str], None] = lambda phase: None) -> Tensor:
        """Images in [0, 1] -> loss ()"""
        targets = self.teacher.targets(x).float()
        mark("tokenizer")
        z = self.code_vectors(x)
        height, width = self.model.encoder.patch_embed.patch_shape
        z_q, quant_loss, _ = self.quantize(z.transpose(1, 2).reshape(len(x), -1, height, width))
        patches = self.model.decoder.fc_norm(encode_tokens(self.model.decoder, z_q)[:, 1:])
        decoded = F.normalize(self.model.decode_task_layer(patches).float(), dim=-1)
        return quant_loss + (1 - (decoded * F.normalize(targets, dim=-1)).sum(dim=-1)).mean()


class PlainViews:
    """PIL image -> the tensors of crops.PretrainingViews, from the same random
    draws.

    Each view is cropped and resized by itself.
    """

    def __init__(
        self,
        size: int,
        second_size: int,
        min_crop_scale: float,
        color_jitter: float,
        mean: Sequence[float],
        std: Sequence[float],
        mask_generator: Callable[[], Any],
    ) -> None:
        self.sizes, self.scale = (size, second_size), [min_crop_scale, 1.0]
        jitter = T.ColorJitter(color_jitter, color_jitter, color_jitter)
        self.before = T.Compose([jitter, T.RandomHorizontalFlip(0.5), T.RandomVerticalFlip(0.0)])
        self.normalize, self.to_tensor = T.Normalize(list(mean), list(std)), T.ToTensor()
        self.mask_generator = mask_generator

    def __call__(self, image: Image.Image) -> dict[str, Tensor]:
        image = self.before(image)
        box = T.RandomResizedCrop.get_params(image, self.scale, [3 / 4, 4 / 3])
        first, second = (
            TF.resized_crop(image, *box, [size, size], InterpolationMode.BICUBIC) for size in self.sizes
        )
        mask = torch.from_numpy(self.mask_generator()).flatten().bool()
        return {
            "image": self.normalize(self.to_tensor(first)),
            "tokenizer_image": self.to_tensor(second),
            "mask": mask,
        }


def read_plainly(path: str) -> Image.Image:
    with open_image(path) as image:
        return image.convert("RGB")
