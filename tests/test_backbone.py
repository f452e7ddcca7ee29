"""Attention paths agree, every variant builds, initialization is as in the paper, and
timm's models stay timm's.
"""

import inspect
import math
import re

import pytest
import timm
import torch
from golden_values import TINY, close, fill, images
from source_files import ROOT
from torch.nn.attention import SDPBackend, sdpa_kernel

import modeling_finetune
import modeling_pretrain
import modeling_vqkd
from layers.rel_pos_bias import relative_position_index
from modeling_finetune import VisionTransformer, remap_pretrained
from modeling_pretrain import (
    VisionTransformerForMaskedImageModeling,
    VisionTransformerForMaskedImageModelingCLS,
)
from vit_backbone import Attention, TrunkConfig, drop_path_ramp, plain_attention


@pytest.mark.parametrize("with_bias", [False, True])
def test_fused_and_plain_attention_agree(with_bias):
    attention = fill(Attention(32, 4, grid=(3, 3) if with_bias else None), 1).eval()
    x = torch.randn(2, 10, 32)
    fused = attention(x)
    plain, weights = attention.weights(x)
    close(fused, plain, atol=1e-6)
    close(weights.sum(-1), torch.ones(2, 4, 10), atol=1e-5)
    assert (weights.std() > 1e-3).item()


def test_cpu_bf16_training_takes_the_plain_path_as_torch_does():
    q, k, v = (torch.randn(2, 4, 10, 8, dtype=torch.bfloat16) for _ in range(3))
    bias = torch.randn(4, 10, 10)
    out, _ = plain_attention(q, k, v, bias, 8**-0.5, drop=0.0)
    with sdpa_kernel(SDPBackend.MATH):
        expected = torch.nn.functional.scaled_dot_product_attention(
            q.float(), k.float(), v.float(), attn_mask=bias[None], scale=8**-0.5
        )
    assert out.dtype == torch.bfloat16
    close(out, expected, atol=0.05)


def test_relative_position_index_by_hand():
    index = relative_position_index((2, 3))
    assert index.shape == (7, 7)
    rows = 3 * 5 + 3
    assert index[0, 1] == rows - 3  # CLS -> patch
    assert index[1, 0] == rows - 2  # patch -> CLS
    assert index[0, 0] == rows - 1
    # query (1, 2), key (0, 1): dy = 1, dx = 1
    assert index[1 + 5, 1 + 1] == (1 + 1) * 5 + (1 + 2)


def test_drop_path_grows_linearly_through_the_head_layers():
    assert drop_path_ramp(0.3, 4) == pytest.approx([0.0, 0.1, 0.2, 0.3])
    model = VisionTransformerForMaskedImageModelingCLS(
        **TINY, drop_path_rate=0.3, early_layers=2, head_layers=2
    )
    rates = [getattr(block.drop_path, "drop_prob", 0.0) for block in model.cls_pt_layers]
    assert rates == pytest.approx([0.2, 0.3])


def test_initialization_of_the_pretraining_model():
    torch.manual_seed(0)
    model = VisionTransformerForMaskedImageModelingCLS(**TINY, early_layers=3, head_layers=2, vocab_size=64)
    assert model.lm_head.weight.abs().max() <= 0.02
    assert model.patch_embed.proj.weight.abs().max() <= 0.02
    assert 0.009 < model.lm_head.weight.std() < 0.012  # normal of std 0.02 cut at one sigma
    assert model.mask_token.abs().max() <= 0.02
    for layer, block in enumerate(model.blocks, start=1):
        assert block.mlp.fc2.weight.abs().max() <= 0.02 / math.sqrt(2 * layer) + 1e-9
        assert block.mlp.fc1.weight.abs().max() <= 0.02
    # the head layers keep PyTorch's uniform initialization (bound 1/sqrt(fan_in)),
    # rescaled with the depth going on
    for layer, block in enumerate(model.cls_pt_layers, start=4):
        bound = 1 / math.sqrt(4 * 48) / math.sqrt(2 * layer)
        assert 0.9 * bound < block.mlp.fc2.weight.abs().max() <= bound + 1e-9
        assert block.mlp.fc1.weight.abs().max() > 0.02


def test_initialization_of_the_finetuning_model():
    torch.manual_seed(0)
    model = VisionTransformer(**TINY, num_classes=10)
    assert model.blocks[0].mlp.fc1.weight.abs().max() > 0.05  # cut at +-2, not at one sigma
    assert model.head.weight.abs().max() < 0.001
    assert model.patch_embed.proj.weight.abs().max() > 0.03  # PyTorch's default for convolutions


@pytest.mark.parametrize("module", [modeling_pretrain, modeling_finetune, modeling_vqkd])
def test_every_variant_builds(module):
    for name, build in module.MODELS.items():
        assert getattr(module, name) is build
        with torch.device("meta"):
            model = build()
        assert sum(p.numel() for p in model.parameters()) > 1e5, name


def test_published_sizes():
    with torch.device("meta"):
        giant = modeling_finetune.beit_giant_patch14_224()
        odd = modeling_pretrain.beit_24x544_patch16_224_8k_vocab_cls_pt()
        student = modeling_pretrain.beit_giant_patch14_224_8k_vocab_cls_pt()
    assert [*map(tuple, (p.shape for p in student.blocks.parameters()))] == [
        *map(tuple, (p.shape for p in giant.blocks.parameters()))
    ]
    assert (giant.embed_dim, len(giant.blocks), giant.blocks[0].attn.num_heads) == (1408, 40, 16)
    assert giant.blocks[0].mlp.fc1.out_features == 6144
    assert (odd.embed_dim, len(odd.blocks)) == (544, 24)
    assert isinstance(odd, VisionTransformerForMaskedImageModelingCLS)


def test_the_page_on_pretraining_knows_every_model():
    """Their sizes as its table gives them, in the published shape: shared bias and layer
    scale.
    """
    page = (ROOT / "docs/pretraining.md").read_text()
    row = r"^\| `(beit_\w+)` \| (\d+) x (\d+), (\d+) \| (\d+), (\d+) \| ([\d.]+), with CLS head ([\d.]+) \|"
    rows = re.findall(row, page, re.MULTILINE)
    shape = dict(use_abs_pos_emb=False, use_shared_rel_pos_bias=True, init_values=0.1)
    for name, *numbers, without, with_cls in rows:
        for model_name, millions in ((name, without), (name + "_cls_pt", with_cls)):
            with torch.device("meta"):
                model = modeling_pretrain.create_model(model_name, **shape)
            heads, sides = model.blocks[0].attn.num_heads, (model.patch_size, model.patch_embed.img_size[0])
            assert [model.embed_dim, len(model.blocks), heads, *sides] == [*map(int, numbers)], model_name
            count = sum(p.numel() for p in model.parameters()) / 1e6
            assert float(millions) == pytest.approx(count, abs=0.1), model_name
    listed = {name + end for name, *_ in rows for end in ("", "_cls_pt")}
    assert modeling_pretrain.MODELS.keys() - listed == {
        f"beit_base_patch16_{size}_8k_vocab" for size in (192, 256)
    }


def test_constructor_defaults_are_the_published_ones():
    of_all_models, own = (
        inspect.signature(TrunkConfig).parameters,
        inspect.signature(VisionTransformer).parameters,
    )
    defaults = {name: parameter.default for name, parameter in (of_all_models | own).items()}
    expected = {
        "img_size": 224, "patch_size": 16, "in_chans": 3, "num_classes": 1000, "embed_dim": 768, "depth": 12,
        "num_heads": 12, "mlp_ratio": 4.0, "qkv_bias": True, "drop_rate": 0.0, "init_values": 0.0,
        "use_abs_pos_emb": True, "use_rel_pos_bias": False, "use_mean_pooling": True, "init_scale": 0.001,
    }  # fmt: skip
    assert {key: defaults[key] for key in expected} == expected


def test_importing_the_project_leaves_timms_models_alone():
    model = timm.create_model("beit_base_patch16_224", num_classes=3, img_size=32, depth=1)
    assert type(model).__module__.startswith("timm.")


@pytest.mark.slow
def test_the_same_weights_in_timms_beitv2_give_the_same_logits():
    ours = modeling_finetune.beit_base_patch16_224(
        use_abs_pos_emb=False, use_rel_pos_bias=True, init_values=0.1
    )
    fill(ours, 7).eval()
    theirs = timm.create_model("beitv2_base_patch16_224", pretrained=False).eval()
    missing, unexpected = theirs.load_state_dict(ours.state_dict(), strict=False)
    assert not missing
    assert all(key.endswith("relative_position_index") for key in unexpected)
    x = (images(2, 224, 8) - 0.5) / 0.5
    with torch.no_grad():
        close(ours(x), theirs(x), atol=5e-4)


def test_pretrained_weights_fit_a_classifier_of_another_grid():
    source = VisionTransformerForMaskedImageModelingCLS(
        **TINY,
        use_abs_pos_emb=True,
        use_shared_rel_pos_bias=True,
        init_values=0.1,
        vocab_size=64,
        early_layers=3,
    )
    fill(source, 1)
    target = VisionTransformer(
        **dict(TINY, img_size=96), num_classes=5, use_abs_pos_emb=True, use_rel_pos_bias=True, init_values=0.1
    )
    weights = {f"module.{key}": value for key, value in source.state_dict().items()}
    before = {key: value.clone() for key, value in weights.items()}
    fitting = remap_pretrained(weights, target)
    assert all(torch.equal(before[key], weights[key]) for key in weights), "pure: the input is untouched"
    assert fitting["pos_embed"].shape == (1, 37, 48)
    tables = [fitting[f"blocks.{i}.attn.relative_position_bias_table"] for i in range(4)]
    assert all(torch.equal(table, tables[0]) for table in tables)
    assert tables[0].shape == (11 * 11 + 3, 4)
    close(tables[0][-3:], source.rel_pos_bias.relative_position_bias_table[-3:], atol=0)
    assert not any(key.startswith(("lm_head", "cls_pt", "mask_token", "head", "norm")) for key in fitting)
    missing = target.load_state_dict(fitting, strict=False).missing_keys
    assert {key for key in missing if "index" not in key} == {
        "fc_norm.weight",
        "fc_norm.bias",
        "head.weight",
        "head.bias",
    }


def test_only_a_head_of_the_same_size_is_kept():
    source = VisionTransformer(**TINY, num_classes=10)
    assert "head.weight" in remap_pretrained(source.state_dict(), VisionTransformer(**TINY, num_classes=10))
    assert "head.weight" not in remap_pretrained(
        source.state_dict(), VisionTransformer(**TINY, num_classes=3)
    )


def test_a_mask_on_the_host_and_on_the_device_are_the_same():
    model = VisionTransformerForMaskedImageModeling(**TINY, vocab_size=32).eval()
    x, mask = images(2, 64, 1), torch.zeros(2, 16, dtype=torch.bool)
    mask[0, 3] = mask[1, 15] = True
    with torch.no_grad():
        everything = model(x, mask, return_all_tokens=True)
        close(model(x, mask), torch.stack((everything[0, 3], everything[1, 15])), atol=1e-6)
        close(model(x, mask.view(2, 4, 4)), model(x, mask), atol=0)
        assert model(x).shape == (0, 32)  # nothing masked


def test_images_of_another_size_are_refused_by_name():
    with pytest.raises(ValueError, match=r"built for images of \(64, 64\)"):
        VisionTransformer(**TINY)(torch.zeros(1, 3, 32, 32))
