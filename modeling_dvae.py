"""The visual tokenizer of BEiT v1: the encoder of DALL-E's discrete VAE (Ramesh et al.,
2021), frozen.

Shapes: B batch, H x W pixels, h x w = H/8 x W/8 grid of N tokens, C width (n_hid x 1,
2, 4, 8), K codes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from checkpoint_io import downloads, weight_files
from checkpoint_io.pickle_builders import PickledObject
from errors import UserError
from layers.token_subset import MaskedPositions

PATCH_SIZE = 8  # pixels per token: three poolings
DALL_E_SIZE = 112  # pixels a side: 14 x 14 tokens, as in BEiT v1
GROUPS = 4
PUBLISHED = "dall_e_encoder"  # in published.ENTRIES


class Conv(nn.Module):
    """Convolution of stride 1 that keeps the size, in the precision of its input; its
    keys are `w` and `b`.
    """

    def __init__(self, n_in: int, n_out: int, kernel: int) -> None:
        super().__init__()
        self.w = nn.Parameter(
            torch.empty(n_out, n_in, kernel, kernel).normal_(std=1 / math.sqrt(n_in * kernel**2))
        )
        self.b = nn.Parameter(torch.zeros(n_out))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.w.to(x.dtype), self.b.to(x.dtype), padding=self.w.shape[-1] // 2)


class ResidualBlock(nn.Module):
    """Bottleneck residual block; `gain` keeps the sum over all blocks in range, for
    there is no normalization.
    """

    def __init__(self, n_in: int, n_out: int, gain: float) -> None:
        super().__init__()
        hidden = n_out // 4
        self.gain = gain
        self.id_path = Conv(n_in, n_out, 1) if n_in != n_out else nn.Identity()
        self.res_path = nn.Sequential()
        widths = (n_in, hidden, hidden, hidden, n_out)
        for i, kernel in enumerate((3, 3, 3, 1)):
            self.res_path.add_module(f"relu_{i + 1}", nn.ReLU())
            self.res_path.add_module(f"conv_{i + 1}", Conv(widths[i], widths[i + 1], kernel))

    def forward(self, x: Tensor) -> Tensor:
        return self.id_path(x) + self.gain * self.res_path(x)


def group(n_in: int, n_out: int, blocks: int, pooled: bool) -> nn.Sequential:
    layers = nn.Sequential()
    for i in range(blocks):
        layers.add_module(
            f"block_{i + 1}", ResidualBlock(n_in if i == 0 else n_out, n_out, gain=1 / (GROUPS * blocks) ** 2)
        )
    if pooled:
        layers.add_module("pool", nn.MaxPool2d(2))
    return layers


def map_pixels(x: Tensor) -> Tensor:
    """[0, 1] -> [0.1, 0.9], away from the ends, where the dVAE's logit-Laplace
    likelihood has no value.
    """
    return 0.8 * x + 0.1


class DallEEncoder(nn.Module):
    """Images -> logits over K codes for every 8 x 8 pixels. Frozen: no gradients,
    always in eval mode.

    Precision: fp32, as OpenAI's own code on a CPU; the last convolution always. On a
    GPU that code computes all the others in fp16; here they are so under autocast only,
    and also under a bf16 one: what differs between fp32 and bf16 would be other tokens.
    State dict: the names of OpenAI's package.
    """

    def __init__(self, n_hid: int = 256, n_blk_per_group: int = 2, vocab_size: int = 8192) -> None:
        super().__init__()
        self.n_hid, self.n_blk_per_group, self.vocab_size = n_hid, n_blk_per_group, vocab_size
        self.blocks = nn.Sequential()
        self.blocks.add_module("input", Conv(3, n_hid, 7))
        for i in range(GROUPS):
            n_in, n_out = n_hid * 2 ** max(i - 1, 0), n_hid * 2**i
            self.blocks.add_module(
                f"group_{i + 1}", group(n_in, n_out, n_blk_per_group, pooled=i < GROUPS - 1)
            )
        self.blocks.add_module("output", nn.Sequential())
        self.blocks.output.add_module("relu", nn.ReLU())
        self.blocks.output.add_module("conv", Conv(n_hid * 2 ** (GROUPS - 1), vocab_size, 1))
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> DallEEncoder:
        return super().train(False)

    compiled_methods = ("forward",)

    def forward(self, x: Tensor) -> Tensor:
        """Mapped images (B, 3, H, W) (see map_pixels) -> logits (B, K, h, w) in fp32.

        UserError: H or W is not a multiple of 8 (poolings would cut the rest off, and
        the grid would not be the student's).
        """
        height, width = x.shape[-2:]
        if height % PATCH_SIZE or width % PATCH_SIZE or not height or not width:
            near = max(round(height / PATCH_SIZE), 1) * PATCH_SIZE
            raise UserError(
                f"DALL-E's encoder takes images whose sides are multiples of {PATCH_SIZE} pixels, not "
                f"{height} x {width}: `second_input_size` {near} would do"
            )
        half = x.is_cuda and torch.is_autocast_enabled("cuda")
        *trunk, output = self.blocks
        with torch.autocast(x.device.type, enabled=False):
            x = x.to(torch.float16 if half else torch.float32)
            for layer in trunk:
                x = layer(x)
            return output(x.float())

    @torch.no_grad()
    def get_codebook_indices(
        self, x: Tensor, bool_masked_pos: Tensor | MaskedPositions | None = None
    ) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] -> token of every 8 x 8 pixels, row by row (B,
        N) int64.

        With a mask (B, N), or its positions: those of its M patches alone, (M,).
        """
        if not x.is_floating_point():
            raise ValueError(f"images must be floating-point numbers in [0, 1], not {x.dtype}")
        codes = self(map_pixels(x.float())).argmax(dim=1).flatten(1)  # B K h w -> B N
        if isinstance(bool_masked_pos, Tensor):
            bool_masked_pos = MaskedPositions.of(bool_masked_pos, x.device)
        return codes if bool_masked_pos is None else bool_masked_pos.select(codes.flatten())


# ── reading its file ──
# Every class that OpenAI's encoder.pkl names, and its decoder.pkl, which is taken for
# it so easily that it is read too, to be named. Also torch's own layers: they are read
# in the form they have in the file, whichever version of torch wrote it.
CLASSES = (
    "dall_e.encoder.Encoder",
    "dall_e.encoder.EncoderBlock",
    "dall_e.decoder.Decoder",
    "dall_e.decoder.DecoderBlock",
    "dall_e.utils.Conv2d",
    "torch.nn.modules.container.Sequential",
    "torch.nn.modules.activation.ReLU",
    "torch.nn.modules.pooling.MaxPool2d",
    "torch.nn.modules.linear.Identity",
    "torch.nn.modules.upsampling.Upsample",
)


def load_dall_e_encoder(path: str | None = None) -> DallEEncoder:
    """The tokenizer in `path`: a file, a URL or a name (see downloads.fetch); None is
    OpenAI's, downloaded once.

    Reads OpenAI's encoder.pkl (a pickled module) without running code from it, and
    state dicts, bare or under `model` or `state_dict`, in any floating-point type.
    Sizes are the file's. UserError: another file than such an encoder.
    """
    source = path or PUBLISHED
    content = weight_files.load_file(downloads.fetch(source), CLASSES)
    if isinstance(content, PickledObject):
        content = dict(pickled_parameters(content))
    state = weight_files.extract_weights(content, source, "model")
    with torch.device("meta"):  # shapes only: the weights are in the file
        model = DallEEncoder(*sizes_in(state, source))
    check_dvae_weights(model, state, source)
    # Copied: the file may be mapped into memory, and a file that changes later must
    # not change the tokens.
    model.load_state_dict({k: v.to(torch.float32, copy=True) for k, v in state.items()}, assign=True)
    return model


def pickled_parameters(root: PickledObject) -> Iterator[tuple[str, Any]]:
    """What a pickled module's state dict would hold, by name."""
    waiting, seen = [("", root)], set()
    while waiting:
        prefix, node = waiting.pop()
        if not isinstance(node, PickledObject) or id(node) in seen:
            continue  # met twice: no tree of layers, perhaps endless
        seen.add(id(node))
        parameters, children = (vars(node).get(kind) for kind in ("_parameters", "_modules"))
        if isinstance(parameters, Mapping) and isinstance(children, Mapping):
            yield from ((f"{prefix}{name}", value) for name, value in parameters.items())
            waiting += [(f"{prefix}{name}.", child) for name, child in children.items()]


def sizes_in(state: Mapping[str, Tensor], source: str) -> tuple[int, int, int]:
    """(n_hid, n_blk_per_group, vocab_size) of an encoder's state dict."""
    first, last = state.get("blocks.input.w"), state.get("blocks.output.conv.w")
    if first is None or last is None:
        lacks = "blocks.input.w" if first is None else "blocks.output.conv.w"
        raise not_an_encoder(source, f"it has no {lacks}, but {', '.join(list(state)[:3])}, ...")
    if first.shape[1:] != (3, 7, 7):
        decoder = ", as in its decoder" if first.shape[2:] == (1, 1) else ""
        raise not_an_encoder(
            source, f"blocks.input.w is {shape_of(first)} instead of n_hid x 3 x 7 x 7{decoder}"
        )
    if not last.ndim:
        raise not_an_encoder(source, "blocks.output.conv.w is a single number")
    blocks = sum(f"blocks.group_1.block_{i + 1}.res_path.conv_1.w" in state for i in range(len(state)))
    return first.shape[0], max(blocks, 1), last.shape[0]


def check_dvae_weights(model: DallEEncoder, state: Mapping[str, Tensor], source: str) -> None:
    wanted = model.state_dict()
    for key in [*wanted, *state]:
        if key not in state or key not in wanted:
            raise not_an_encoder(source, f"{key} is {'missing' if key in wanted else 'too much'}")
        if state[key].shape != wanted[key].shape:
            raise not_an_encoder(
                source, f"{key} is {shape_of(state[key])} instead of {shape_of(wanted[key])}"
            )
        if not state[key].is_floating_point():
            raise not_an_encoder(source, f"{key} holds {state[key].dtype} instead of floating-point numbers")


def shape_of(tensor: Tensor) -> str:
    return " x ".join(map(str, tensor.shape)) or "a single number"


def not_an_encoder(source: str, why: str) -> UserError:
    return UserError(
        f"{source} is not DALL-E's encoder ({why}); `python model_zoo.py {PUBLISHED}` downloads OpenAI's "
        "encoder.pkl"
    )
