"""The vision transformer that every stage shares: patch embedding, relative position
bias, attention, block, trunk. Above 300 lines, so that the whole network is in one
file.

Shapes: B batch, N patches (grid height x width), T = 1 + N tokens with CLS in front, C
width, H heads, D = C / H. Sources: Dosovitskiy et al. 2021 (ViT); BEiT, section 2 and
appendix (initialization); Swin (relative position bias). Names of parameters are an
interface: released checkpoints carry them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from timm.layers import DropPath
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from layers.attention import fused_attention, plain_attention
from layers.init_weights import truncated_normal_
from layers.rel_pos_bias import (
    PositionGrid,
    add_relative_position_bias,
    as_pair,
    dynamic_resize_matrix,
    has_dynamic_size,
    relative_position_bias,
    relative_position_index,
    resize_pos_embed,
)
from layers.token_subset import TokenSubset


class Size(NamedTuple):
    """One row of the table of model sizes."""

    embed_dim: int
    depth: int
    num_heads: int
    mlp_ratio: float = 4.0


SIZES = {
    "mini": Size(64, 6, 2),
    "demo": Size(128, 6, 4),
    "tiny": Size(192, 12, 3),
    "small": Size(384, 12, 6),
    "base": Size(768, 12, 12),
    "24x544": Size(544, 24, 16),
    "large": Size(1024, 24, 16),
    "huge": Size(1280, 32, 16),
    "giant": Size(1408, 40, 16, 6144 / 1408),
}

LayerNorm = functools.partial(nn.LayerNorm, eps=1e-6)


class PatchEmbed(nn.Module):
    """Image (B, in_chans, height, width) -> patch tokens (B, N, C) in row-major
    order.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
    ) -> None:
        super().__init__()
        self.img_size, self.patch_size = as_pair(img_size), as_pair(patch_size)
        if any(side % patch for side, patch in zip(self.img_size, self.patch_size, strict=True)):
            raise ValueError(
                f"input size {self.img_size} is not a multiple of the patch size {self.patch_size}"
            )
        self.patch_shape = (self.img_size[0] // self.patch_size[0], self.img_size[1] // self.patch_size[1])
        self.num_patches = self.patch_shape[0] * self.patch_shape[1]
        self.proj = nn.Conv2d(in_chans, embed_dim, kernel_size=self.patch_size, stride=self.patch_size)

    def forward(self, x: Tensor) -> Tensor:
        if tuple(x.shape[-2:]) != self.img_size:
            raise ValueError(
                f"the model was built for images of {self.img_size}, this batch has {tuple(x.shape[-2:])}"
            )
        return self.embed_any_size(x)

    def embed_any_size(self, x: Tensor) -> Tensor:
        """(B, in_chans, height, width), multiples of the patch size -> (B, N, C)."""
        return self.proj(x).flatten(2).transpose(1, 2)  # (B, C, h, w) -> (B, N, C)


class RelativePositionBias(nn.Module):
    """One table shared by all blocks; the forward pass gathers it once: () -> (H, T,
    T).
    """

    relative_position_bias_table: nn.Parameter
    relative_position_index: Tensor

    def __init__(self, grid: tuple[int, int], num_heads: int) -> None:
        super().__init__()
        add_relative_position_bias(self, grid, num_heads)

    def forward(self, grid: PositionGrid | None = None) -> Tensor:
        return relative_position_bias(self, grid)


def cast_frozen(network: Any, dtype: torch.dtype | None) -> None:
    """Cast the weights of a frozen network once, as autocast to `dtype` does at every
    step: the results are the same, bit for bit. Other layers stay in fp32, as under
    autocast. From then on the network runs under that autocast alone.
    """
    for module in network.modules():
        if dtype is not None and type(module) in (nn.Linear, nn.Conv2d):
            module.to(dtype)


class Attention(nn.Module):
    """Multi-head self-attention whose key has no bias (BEiT), with an optional position
    bias added before softmax.
    """

    relative_position_bias_table: nn.Parameter | None
    relative_position_index: Tensor

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        grid: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"width {dim} is not a multiple of {num_heads} heads")
        self.num_heads = num_heads
        self.scale = (dim // num_heads) ** -0.5
        self.attn_drop = attn_drop
        self.attend = fused_attention
        self.q_bias = nn.Parameter(torch.zeros(dim)) if qkv_bias else None
        self.v_bias = nn.Parameter(torch.zeros(dim)) if qkv_bias else None
        self.relative_position_bias_table = None
        if grid is not None:
            add_relative_position_bias(self, grid, num_heads)
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def position_bias(self, shared: Tensor | None, grid: PositionGrid | None = None) -> Tensor | None:
        """The block's own bias plus the shared one, (H, T, T), or None where the model
        has neither.
        """
        if self.relative_position_bias_table is None:
            return shared
        own = relative_position_bias(self, grid)
        return own if shared is None else own + shared

    def project(self, x: Tensor, subset: TokenSubset | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """(B, T, C) -> query (B, H, T, D), or of the subset alone (B, H, R, D); key and
        value (B, H, T, D).
        """
        bias = None
        if self.q_bias is not None and self.v_bias is not None:
            bias = torch.cat((self.q_bias, torch.zeros_like(self.v_bias), self.v_bias))
        if subset is None:
            qkv = F.linear(x, self.qkv.weight, bias)
            q, k, v = rearrange(qkv, "b t (three h d) -> three b h t d", three=3, h=self.num_heads).unbind(0)
            return q, k, v
        width = x.shape[-1]
        kv = F.linear(x, self.qkv.weight[width:], None if bias is None else bias[width:])
        k, v = rearrange(kv, "b t (two h d) -> two b h t d", two=2, h=self.num_heads).unbind(0)
        q = F.linear(subset.gather(x), self.qkv.weight[:width], self.q_bias)
        return rearrange(q, "b r (h d) -> b h r d", h=self.num_heads), k, v

    def forward(
        self,
        x: Tensor,
        rel_pos_bias: Tensor | None = None,
        subset: TokenSubset | None = None,
        grid: PositionGrid | None = None,
    ) -> Tensor:
        """(B, T, C) -> (B, T, C), or of the subset (B, R, C). `grid`: the tokens' grid,
        if not the model's.
        """
        q, k, v = self.project(x, subset)
        bias = self.position_bias(rel_pos_bias, grid)
        if bias is not None:
            bias = bias[None] if subset is None else subset.gather_bias(bias)
        out = self.attend(q, k, v, bias, self.scale, self.attn_drop if self.training else 0.0)
        return self.proj_drop(self.proj(rearrange(out, "b h t d -> b t (h d)")))

    def weights(self, x: Tensor, rel_pos_bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """For looking at attention: (output (B, T, C), softmax weights (B, H, T,
        T)).
        """
        q, k, v = self.project(x)
        drop = self.attn_drop if self.training else 0.0
        out, weights = plain_attention(q, k, v, self.position_bias(rel_pos_bias), self.scale, drop)
        return self.proj_drop(self.proj(rearrange(out, "b h t d -> b t (h d)"))), weights


class Mlp(nn.Module):
    """C -> hidden -> C with the exact GELU; dropout only at the end (BEiT leaves the
    middle one out).
    """

    def __init__(self, dim: int, hidden: int, drop: float = 0.0) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, dim)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.fc2(self.act(self.fc1(x))))


def recomputable(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Of a block's forward: where the block is told to `recompute`, the backward pass
    computes its inside a second time (the same dropped paths) instead of keeping it.
    """

    @functools.wraps(forward)
    def wrapped(block: Any, *args: Any) -> Tensor:
        if block.recompute and block.training and torch.is_grad_enabled():
            return checkpoint(forward, block, *args, use_reentrant=False)
        return forward(block, *args)

    return wrapped


def recompute_blocks(model: nn.Module) -> None:
    """`grad_checkpointing`: memory of one block's inside instead of all blocks', for a
    third more computing.
    """
    for module in model.modules():
        if isinstance(module, Block):
            module.recompute = True


class Block(nn.Module):
    """Pre-norm transformer block with layer scale (`init_values` > 0) and stochastic
    depth.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        drop: float = 0.0,
        attn_drop: float = 0.0,
        drop_path: float = 0.0,
        init_values: float | None = 0.0,
        norm_layer: Callable[[int], nn.Module] = LayerNorm,
        grid: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        self.norm1 = norm_layer(dim)
        self.attn = Attention(dim, num_heads, qkv_bias, attn_drop, drop, grid)
        self.drop_path = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()
        self.norm2 = norm_layer(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop)
        layer_scale = bool(init_values and init_values > 0)
        self.gamma_1 = nn.Parameter(init_values * torch.ones(dim)) if layer_scale else None
        self.gamma_2 = nn.Parameter(init_values * torch.ones(dim)) if layer_scale else None
        self.recompute = False

    @recomputable
    def forward(
        self,
        x: Tensor,
        rel_pos_bias: Tensor | None = None,
        subset: TokenSubset | None = None,
        grid: PositionGrid | None = None,
    ) -> Tensor:
        """(B, T, C) -> (B, T, C), or of the subset alone (B, R, C). `grid`: the tokens'
        grid, if not the model's.
        """
        attended = self.attn(self.norm1(x), rel_pos_bias, subset, grid)
        x = x if subset is None else subset.gather(x)
        x = x + self.drop_path(apply_layer_scale(self.gamma_1, attended))
        return x + self.drop_path(apply_layer_scale(self.gamma_2, self.mlp(self.norm2(x))))

    def attention_weights(self, x: Tensor, rel_pos_bias: Tensor | None = None) -> Tensor:
        """What forward(x) attends to: (B, H, T, T), rows sum to 1."""
        return self.attn.weights(self.norm1(x), rel_pos_bias)[1]


def apply_layer_scale(gamma: Tensor | None, x: Tensor) -> Tensor:
    return x if gamma is None else gamma * x


def drop_path_ramp(rate: float, steps: int) -> list[float]:
    """Stochastic depth grows linearly from 0 at the first block to `rate` at the
    last.
    """
    return [rate * i / max(steps - 1, 1) for i in range(steps)]


@dataclass(frozen=True)
class TrunkConfig:
    """What all models take, by keyword; the names and defaults are the published
    ones.
    """

    img_size: int | tuple[int, int] = 224
    patch_size: int = 16
    in_chans: int = 3
    embed_dim: int = 768
    depth: int = 12
    num_heads: int = 12
    mlp_ratio: float = 4.0
    qkv_bias: bool = True
    drop_rate: float = 0.0  # dropout of tokens, projections and MLPs
    attn_drop_rate: float = 0.0
    drop_path_rate: float = 0.0  # stochastic depth of the last block
    norm_layer: Callable[[int], nn.Module] | None = None  # None: LayerNorm with norm_eps
    norm_eps: float = 1e-6
    init_values: float | None = 0.0  # of layer scale; 0 or None: without it
    use_abs_pos_emb: bool = True
    use_rel_pos_bias: bool = False  # a table in each block
    use_shared_rel_pos_bias: bool = False  # one table for all blocks


class Trunk(nn.Module):
    """Patch embedding, CLS (and mask) token, positions and blocks. Models add what
    reads the tokens.

    `options`: fields of TrunkConfig. The order in which parameters are registered is
    the published one: optimizer states are stored by position.
    """

    num_prefix_tokens = 1  # CLS

    def __init__(self, *, with_mask_token: bool = False, **options: Any) -> None:
        super().__init__()
        c = TrunkConfig(**options)
        self.embed_dim = self.num_features = c.embed_dim
        self.patch_size, self.drop_path_rate = c.patch_size, c.drop_path_rate
        self.norm_layer = c.norm_layer or functools.partial(LayerNorm, eps=c.norm_eps)
        if c.norm_eps != TrunkConfig.norm_eps:  # for code that builds the model from its file
            self.register_buffer("norm_eps", torch.tensor(c.norm_eps, dtype=torch.float64))
        patch_embed = PatchEmbed(c.img_size, c.patch_size, c.in_chans, c.embed_dim)
        grid = patch_embed.patch_shape
        self.cls_token = nn.Parameter(torch.zeros(1, 1, c.embed_dim))
        if with_mask_token:
            self.mask_token = nn.Parameter(torch.zeros(1, 1, c.embed_dim))
        positions = torch.zeros(1, patch_embed.num_patches + 1, c.embed_dim)
        self.pos_embed = nn.Parameter(positions) if c.use_abs_pos_emb else None
        self.patch_embed = patch_embed
        self.pos_drop = nn.Dropout(c.drop_rate)
        self.rel_pos_bias = RelativePositionBias(grid, c.num_heads) if c.use_shared_rel_pos_bias else None
        self.make_block = functools.partial(
            Block,
            dim=c.embed_dim,
            num_heads=c.num_heads,
            mlp_ratio=c.mlp_ratio,
            qkv_bias=c.qkv_bias,
            drop=c.drop_rate,
            attn_drop=c.attn_drop_rate,
            init_values=c.init_values,
            norm_layer=self.norm_layer,
            grid=grid if c.use_rel_pos_bias else None,
        )
        rates = drop_path_ramp(c.drop_path_rate, c.depth)
        self.blocks = nn.ModuleList(self.make_block(drop_path=rate) for rate in rates)

    def init_tokens(self, std: float, cut: float) -> None:
        for tensor in (self.cls_token, getattr(self, "mask_token", None), self.pos_embed):
            if tensor is not None:
                truncated_normal_(tensor, std, cut)

    def position_grid(self, x: Tensor) -> PositionGrid | None:
        """The grid of images (B, in_chans, height, width), multiples of the patch size,
        if it is not the model's.
        """
        grid = (x.shape[-2] // self.patch_embed.patch_size[0], x.shape[-1] // self.patch_embed.patch_size[1])
        if has_dynamic_size(grid):
            sides = zip(self.patch_embed.patch_shape, grid, strict=True)
            down, across = (dynamic_resize_matrix(*own_and_new).to(x.device) for own_and_new in sides)
            return PositionGrid(grid, relative_position_index(grid).to(x.device), (down, across))
        if grid == self.patch_embed.patch_shape:
            return None
        return PositionGrid(grid, relative_position_index(grid, x.device))

    def embed(self, x: Tensor, mask: Tensor | None = None, grid: PositionGrid | None = None) -> Tensor:
        """Image (B, in_chans, height, width) -> tokens (B, T, C); where `mask` (B, N)
        is True stands the mask token.

        `grid`: the images' grid, if it is not the model's: positions are stretched to
        it.
        """
        tokens = self.patch_embed(x) if grid is None else self.patch_embed.embed_any_size(x)
        if mask is not None:
            tokens = torch.where(mask[..., None], self.mask_token.to(tokens.dtype), tokens)
        tokens = torch.cat((self.cls_token.expand(tokens.shape[0], -1, -1), tokens), dim=1)
        if self.pos_embed is not None:
            own = self.patch_embed.patch_shape
            tokens = tokens + (
                self.pos_embed if grid is None else resize_pos_embed(self.pos_embed, grid.size, own)
            )
        return self.pos_drop(tokens)

    def shared_bias(self, grid: PositionGrid | None = None) -> Tensor | None:
        """The bias shared by all blocks, (H, T, T), gathered once per forward pass;
        None where there is none.
        """
        return None if self.rel_pos_bias is None else self.rel_pos_bias(grid)

    def attention_maps(self, x: Tensor, layer: int = -1) -> Tensor:
        """Attention of one block on images x: (B, H, T, T)."""
        layer = layer % len(self.blocks)
        tokens, bias = self.embed(x), self.shared_bias()
        for block in self.blocks[:layer]:
            tokens = block(tokens, bias)
        return self.blocks[layer].attention_weights(tokens, bias)

    def get_num_layers(self) -> int:
        return len(self.blocks)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        return {"pos_embed", "cls_token"}


@dataclass(frozen=True)
class Variant:
    """One row of a table of published models. Calling it builds the model; `options`
    replace what the row says.
    """

    model: Callable[..., Any]
    size: str  # row of SIZES
    patch_size: int
    img_size: int

    def __call__(self, pretrained: bool = False, **options: Any) -> Any:
        if pretrained:
            raise ValueError("no weights belong to this name: load a checkpoint into the model it builds")
        row = {"img_size": self.img_size, "patch_size": self.patch_size, **SIZES[self.size]._asdict()}
        return self.model(**row | options)
