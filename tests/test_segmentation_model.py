"""Segmentation models: published values and names, images of any size, batch norm over
processes.
"""

import pytest
import torch
from golden_values import arrays, close, data, fill_module
from many_processes import run_ranks
from numpy.random import RandomState
from torch import nn

import modeling_segmentation
from errors import UserError
from layers.conv_module import BatchNorm, ConvModule
from layers.rel_pos_bias import relative_position_index, resize_rel_pos_bias_table
from modeling_segmentation import FCNHead, SegmentationBackbone, UPerHead, create_model
from vit_backbone import SIZES, Trunk

SEED = 600
TINY = dict(img_size=64, patch_size=16, embed_dim=48, depth=4, num_heads=4)
BEIT = dict(use_abs_pos_emb=False, use_rel_pos_bias=True, init_values=0.1)


def filled(head: nn.Module, prefix: str) -> nn.Module:
    """The weights behind the golden values: batch norms around 1."""
    new = {}
    for key, value in head.state_dict().items():
        x = torch.tensor(fill_module.fill_array(f"{prefix}.{key}", tuple(value.shape), SEED))
        if key.endswith("running_var"):
            x = 1 + 0.1 * x.abs()
        elif key.endswith("bn.weight"):
            x = 1 + x
        new[key] = x if value.is_floating_point() else value
    head.load_state_dict(new)
    return head.eval()


def test_heads_reproduce_the_published_values():
    stream = RandomState(SEED + 1)
    maps = [torch.from_numpy(stream.standard_normal((1, 48, s, s))).float() for s in (16, 8, 4, 2)]
    golden = arrays("upernet_tiny")
    close(filled(UPerHead([48] * 4, 32, 5), "decode_head")(maps), golden["decode"])
    close(filled(FCNHead(48, 16, 5), "auxiliary_head")(maps[2]), golden["aux"])


@pytest.mark.parametrize(("case", "classes"), [("tiny", 5), ("base", 150)])
def test_keys_of_the_heads_are_the_released_ones(case, classes):
    if case == "tiny":
        heads = {"decode_head": UPerHead([48] * 4, 32, classes), "auxiliary_head": FCNHead(48, 16, classes)}
        mine = nn.ModuleDict(heads).state_dict()
    else:
        with torch.device("meta"):
            model = create_model("upernet_beit_base_patch16", classes, **BEIT)
        mine = {key: value for key, value in model.state_dict().items() if not key.startswith("backbone.")}
        backbone = {
            key.removeprefix("backbone."): v
            for key, v in model.state_dict().items()
            if key.startswith("backbone.")
        }
        with torch.device("meta"):
            trunk = Trunk(img_size=512, **SIZES["base"]._asdict(), **BEIT)
        pyramid = [f"fpn1.{i}.{name}" for i in (0, 3) for name in ("weight", "bias")] + [
            "fpn2.0.weight",
            "fpn2.0.bias",
        ]
        pyramid += [f"fpn1.1.{name}" for name in nn.BatchNorm2d(1).state_dict()]
        assert backbone.keys() == trunk.state_dict().keys() | set(pyramid)
    assert {key: list(value.shape) for key, value in mine.items()} == data("upernet_keys")[case]


@pytest.mark.parametrize("name", modeling_segmentation.MODELS)
def test_every_variant_builds(name):
    with torch.device("meta"):
        model = create_model(name, 7, **BEIT)
    head, size = modeling_segmentation.MODELS[name]
    if size in ("base", "large") and head == "upernet":
        assert model.backbone.out_indices == {"base": (3, 5, 7, 11), "large": (7, 11, 15, 23)}[size]
        assert model.decode_head.bottleneck.conv.out_channels == {"base": 768, "large": 1024}[size]
        assert model.auxiliary_head.convs[0].conv.out_channels == 256


@pytest.mark.parametrize("head", ["upernet", "setr_pup"])
def test_images_of_any_size(head):
    """Logits of the image's size; a side that is not a multiple of the patch is padded,
    and the padding is cut off again.
    """
    torch.manual_seed(0)
    model = create_model(f"{head}_beit_demo_patch16", 5, img_size=64, **BEIT)
    for size in ((64, 64), (96, 48), (70, 33), (7, 130)):
        images = torch.randn(2, 3, *size)
        model.train()
        logits, auxiliary = model(images)
        assert logits.shape == (2, 5, *size)
        assert (auxiliary is None) == (head == "setr_pup")
        with torch.no_grad():
            assert model.eval()(images).shape == (2, 5, *size)


def test_backbone_gives_raw_outputs_of_its_blocks():
    torch.manual_seed(0)
    backbone = SegmentationBackbone((0, 1, 2, 3), pyramid=True, **TINY, **BEIT).eval()
    x = torch.randn(2, 3, 64, 64)
    tokens, outputs = backbone.embed(x), []
    for block in backbone.blocks:
        tokens = block(tokens)
        outputs.append(tokens)
    maps = backbone(x)
    assert [m.shape[-1] for m in maps] == [16, 8, 4, 2]
    assert torch.equal(maps[2].flatten(2).transpose(1, 2), outputs[2][:, 1:])
    assert torch.equal(
        maps[3], nn.functional.max_pool2d(outputs[3][:, 1:].transpose(1, 2).unflatten(2, (4, 4)), 2)
    )


def test_another_size_is_another_model_with_stretched_tables():
    """Running a model at another size is what a model of that size with resized tables
    does; and the tables learn there.
    """
    torch.manual_seed(0)
    small = SegmentationBackbone((3,), pyramid=False, **TINY, **BEIT)
    for block in small.blocks:
        nn.init.normal_(block.attn.relative_position_bias_table)
    large = SegmentationBackbone((3,), pyramid=False, **{**TINY, "img_size": (96, 128)}, **BEIT)
    weights = {}
    for key, value in small.state_dict().items():
        if key.endswith("table"):
            value = resize_rel_pos_bias_table(value, (6, 8), (4, 4))
        weights[key] = relative_position_index((6, 8)) if key.endswith("index") else value
    large.load_state_dict(weights)
    x = torch.randn(1, 3, 96, 128)
    (one,), (other,) = small(x), large(x)
    torch.testing.assert_close(one, other)
    one.square().sum().backward()
    assert all(float(block.attn.relative_position_bias_table.grad.abs().sum()) > 0 for block in small.blocks)


def test_a_size_that_is_no_multiple_of_the_patch_is_refused():
    with pytest.raises(UserError, match="`input_size`"):
        create_model("upernet_beit_demo_patch16", 5, img_size=100)


# ── Batch norm over processes ──


def step_of_a_convolution(rank, world_size, x):
    torch.manual_seed(0)
    module = ConvModule(3, 4, 3)
    nn.init.normal_(module.bn.bias)
    mine = x[rank * len(x) // world_size : (rank + 1) * len(x) // world_size].clone().requires_grad_()
    out = module(mine)
    (out * torch.arange(out.shape[-1])).square().sum().backward()
    grads = [p.grad for p in module.parameters()]
    buffers = dict(module.bn.state_dict())
    return {"out": out.detach(), "x": mine.grad, "grads": grads, "buffers": buffers}


@pytest.mark.slow
def test_batch_norm_over_two_processes_is_that_of_one():
    x = torch.randn(6, 3, 5, 7, generator=torch.Generator().manual_seed(1)) + 3
    alone, ranks = step_of_a_convolution(0, 1, x), run_ranks(step_of_a_convolution, 2, x)
    torch.testing.assert_close(torch.cat([r["out"] for r in ranks]), alone["out"], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(torch.cat([r["x"] for r in ranks]), alone["x"], atol=1e-3, rtol=1e-4)
    for name, value in alone["buffers"].items():
        assert all(torch.allclose(r["buffers"][name], value, atol=1e-5) for r in ranks), name
    for one, *shares in zip(alone["grads"], *(r["grads"] for r in ranks), strict=True):
        torch.testing.assert_close(sum(shares), one, atol=1e-2, rtol=1e-4)


def test_batch_norm_of_one_process_is_torchs():
    torch.manual_seed(0)
    mine, torchs, x = BatchNorm(4), nn.BatchNorm2d(4), torch.randn(2, 4, 3, 3)
    assert torch.equal(mine(x), torchs(x))
    assert torch.equal(mine.running_var, torchs.running_var)
