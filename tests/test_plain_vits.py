"""Weights of plain ViTs of other libraries, and of models inside others: our model
computes what theirs does, or refuses them.
"""

import pytest
import timm.layers
import torch
from golden_values import vit
from refusals import refused, user_reads
from timm.models.beit import Beit
from timm.models.vision_transformer import VisionTransformer as PlainViT
from tiny_runs import SIZE, as_flags, finetuning_flags, photos, tokenizer

import modeling_finetune
import modeling_vqkd
import pretrained
import run_class_finetuning
import run_linear_eval
from checkpoint_io import huggingface_format, remapping, weight_source
from errors import UserError
from modeling_finetune import remap_pretrained
from segmentation import trained_segmenter

# ── Weights of plain ViTs ──
PLAIN = {"img_size": 32, "patch_size": 16, "embed_dim": 128, "depth": 6, "num_heads": 4}
POSITIONS = {"use_abs_pos_emb": True, "use_rel_pos_bias": False}
IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def plain_vit(kind=PlainViT, **settings):
    torch.manual_seed(0)
    model = kind(**PLAIN, **({"num_classes": 2, "global_pool": "token"} | settings)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model


def ours(**settings):
    return modeling_finetune.create_model(
        "beit_demo_patch16_128", **({"img_size": 32, "num_classes": 2} | POSITIONS | settings)
    ).eval()


def last_cls(model):
    """What the last block gives for CLS, as a frozen backbone is asked for it."""
    found = []
    handle = model.blocks[-1].register_forward_hook(lambda _, __, out: found.append(out[:, 0]))
    with torch.no_grad():
        model(IMAGES)
    handle.remove()
    return found[0]


@pytest.mark.parametrize(
    ("settings", "init_values"),
    [
        ({}, 0),
        ({}, 0.1),
        ({"global_pool": "avg", "fc_norm": True}, 0),
        ({"init_values": 0.1}, 0.1),
        ({"qkv_bias": False}, 0),
        ({"no_embed_class": True}, 0.1),
    ],
)
def test_logits_of_a_plain_vit_are_those_of_its_own_library(settings, init_values):
    """Its bias of q, k and v, its layer scale or that it has none, and positions of the
    patches alone.
    """
    theirs = plain_vit(**settings)
    model = ours(init_values=init_values, use_mean_pooling="fc_norm" in settings)
    pretrained.load_fitting(model, theirs.state_dict(), "x.pth")
    with torch.no_grad():
        torch.testing.assert_close(model(IMAGES), theirs(IMAGES), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("settings", [{}, {"init_values": 0.1}, {"no_embed_class": True}])
def test_a_frozen_backbone_computes_what_its_file_does(settings, tmp_path):
    theirs = plain_vit(**settings)
    torch.save(theirs.state_dict(), tmp_path / "w.pth")
    model, _ = pretrained.open_backbone(str(tmp_path / "w.pth"), num_heads=4)
    torch.testing.assert_close(
        model.get_intermediate_layers(IMAGES)[-1][:, 0], last_cls(theirs), atol=2e-6, rtol=1e-6
    )
    segmenter = trained_segmenter.modeling_segmentation.create_model(
        "upernet_beit_demo_patch16", 3, 32, **POSITIONS, init_values=0.1
    )
    trained_segmenter.load_pretrained(
        segmenter.eval(), weight_source.read_weights(str(tmp_path / "w.pth")), "--finetune w.pth"
    )
    tokens = segmenter.backbone.embed(IMAGES)
    for block in segmenter.backbone.blocks:
        tokens = block(tokens)
    torch.testing.assert_close(tokens[:, 0], last_cls(theirs), atol=2e-6, rtol=1e-6)


OTHERS = {
    "queries and keys are normalized": {"qk_norm": True},
    "SwiGLU": {"mlp_layer": timm.layers.SwiGLU},
    "blocks.0.mlp.fc2.weight is 128 x 256 in it and 128 x 512 in the model": {
        "mlp_layer": timm.layers.GluMlp
    },
    "register tokens": {"reg_tokens": 4},
    "normalized before the blocks": {"pre_norm": True},
    "its blocks hold more .blocks.0.attn.norm.weight.": {"scale_attn_norm": True},
    "gated": {"kind": Beit, "swiglu_mlp": True, "scale_mlp": True},
}


@pytest.mark.parametrize("reason", OTHERS)
def test_a_part_without_a_home_is_refused_by_name(reason, tmp_path):
    torch.save(plain_vit(**OTHERS[reason]).state_dict(), tmp_path / "w.pth")
    with pytest.raises(UserError, match=reason):
        pretrained.open_backbone(str(tmp_path / "w.pth"), num_heads=4)
    with pytest.raises(UserError, match=reason):
        pretrained.load_fitting(
            ours(init_values=0.1), plain_vit(**OTHERS[reason]).state_dict(), "--finetune w.pth"
        )


@pytest.mark.parametrize(
    ("theirs", "mine", "reason"),
    [
        ({"init_values": 0.1}, {"init_values": 0}, "no blocks.0.gamma_1: give --layer_scale_init_value 0.1"),
        ({}, {"qkv_bias": False}, "no blocks.0.attn.q_bias: leave out --disable_qkv_bias"),
        ({}, {"depth": 4}, "no blocks.4.norm1.weight: name the --model"),
        ({}, {"depth": 8}, "lacks blocks.6.gamma_1; name the --model"),
        ({"class_token": False, "global_pool": "avg"}, {}, "lacks cls_token"),
    ],
)
def test_a_model_that_would_compute_something_else_is_refused(theirs, mine, reason):
    with user_reads(f"w.pth does not fit this model or is incomplete: .*{reason}"):
        pretrained.load_fitting(
            ours(**({"init_values": 0.1} | mine)), plain_vit(**theirs).state_dict(), "w.pth"
        )


def test_positions_missing_in_the_file_change_nothing_at_first():
    source, model = (
        vit(32, embed_dim=128, depth=6, num_classes=2),
        ours(use_rel_pos_bias=True, init_values=0.1),
    )
    pretrained.load_fitting(model, source.state_dict(), "w.pth")
    with torch.no_grad():
        torch.testing.assert_close(model(IMAGES), source(IMAGES), atol=1e-6, rtol=1e-6)


def test_patch_embeddings_are_adapted_as_timm_does(tmp_path, capsys):
    gray = plain_vit(in_chans=1)
    torch.save(gray.state_dict(), tmp_path / "gray.pth")
    model, _ = pretrained.open_backbone(str(tmp_path / "gray.pth"), num_heads=4)
    gray_images = IMAGES[:, :1].expand(-1, 3, -1, -1)
    with torch.no_grad():
        torch.testing.assert_close(
            model.patch_embed(gray_images), gray.patch_embed(IMAGES[:, :1]), atol=1e-5, rtol=1e-5
        )
    source, target = ours(patch_size=8), ours()
    weight = remap_pretrained(source.state_dict(), target)["patch_embed.proj.weight"]
    assert torch.equal(weight, timm.layers.resample_patch_embed(source.patch_embed.proj.weight, [16, 16]))
    summed = remap_pretrained(source.state_dict(), ours(patch_size=8, in_chans=1))["patch_embed.proj.weight"]
    torch.testing.assert_close(summed, source.patch_embed.proj.weight.sum(dim=1, keepdim=True))
    report = "\n".join(
        remapping.report_remapping(gray.state_dict(), model, remap_pretrained(gray.state_dict(), model))
    )
    assert (
        "adapted    the patch embedding: 1 channel, patches of 16 x 16 -> 3 channels, patches of 16 x 16"
    ) in report
    data = photos(tmp_path / "data", per_class=2)
    where = [
        *as_flags(data_set="image_folder", data_path=data, eval_data_path=data, knn=True, knn_k=1),
    ]
    run_linear_eval.main([*where, *SIZE[:-2], "--finetune", str(tmp_path / "gray.pth"), "--num_heads", "4"])
    assert "adapted    the patch embedding: 1 channel" in capsys.readouterr().out


# ── Wrappers ──
PREFIXES = (
    "_orig_mod. module. model. net. encoder. backbone. module._orig_mod. model.net.encoder. _orig_mod.module."
)


@pytest.mark.parametrize("prefix", PREFIXES.split())
def test_what_wraps_a_model_is_taken_off(prefix, tmp_path):
    source = vit()
    inside = {
        f"{prefix}{key}".replace("blocks.1.", "blocks.1._orig_mod."): value
        for key, value in source.state_dict().items()
    }
    torch.save({"state_dict": inside | {"loss.weight": torch.ones(1)}}, tmp_path / "w.pth")
    model, _ = pretrained.open_backbone(str(tmp_path / "w.pth"))
    x = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(model.get_intermediate_layers(x)[-1], source.get_intermediate_layers(x)[-1])
    assert remap_pretrained(inside, vit()).keys() == remap_pretrained(source.state_dict(), vit()).keys()
    theirs = huggingface_format.to_huggingface(source.state_dict(), huggingface_format.CLASSIFIER).weights
    assert (
        remap_pretrained({prefix + key: value for key, value in theirs.items()}, vit()).keys()
        == remap_pretrained(theirs, vit()).keys()
    )


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "model.", "module._orig_mod."])
def test_a_wrapped_tokenizer_stays_a_tokenizer(prefix, tmp_path):
    weights = torch.load(tokenizer(tmp_path / "w.pth"), weights_only=True)["model"]
    torch.save({"model": {prefix + key: value for key, value in weights.items()}}, tmp_path / "wrapped.pth")
    one, two = (modeling_vqkd.open_tokenizer(str(tmp_path / name))[0] for name in ("w.pth", "wrapped.pth"))
    assert torch.equal(one.get_codebook_indices(IMAGES), two.get_codebook_indices(IMAGES))
    content = weight_source.read_weights(str(tmp_path / "wrapped.pth"))
    with pytest.raises(UserError, match="is a VQ-KD tokenizer"):
        pretrained.load_fitting(ours(), content.weights, "x.pth")


def test_the_outer_of_two_models_is_taken_unless_ambiguous():
    weights = vit().state_dict()
    average = {f"encoder.{key}": torch.zeros_like(value) for key, value in weights.items()}
    assert all(
        torch.equal(value, weights[key]) for key, value in remap_pretrained(weights | average, vit()).items()
    )
    twice = {
        **{f"model.{key}": value for key, value in weights.items()},
        "norm.weight": 1,
        "model.norm.weight": 2,
    }
    with pytest.raises(UserError, match=r"two tensors that could be norm\.weight"):
        remap_pretrained(twice, vit())


@pytest.mark.parametrize("flag", ["--model_filter_name", "--model_prefix"])
def test_one_of_several_models_in_a_file_is_chosen_by_its_prefix(flag, tmp_path, capsys):
    data, source = photos(tmp_path / "data", per_class=1), ours(init_values=0.1)
    both = {
        f"{part}.{key}": value
        for part in ("student", "encoder")
        for key, value in source.state_dict().items()
    }
    torch.save({"model": both}, tmp_path / "w.pth")
    flags = finetuning_flags(
        data, "", "--finetune", str(tmp_path / "w.pth"), "--epochs", "1", "--abs_pos_emb"
    )
    flags += ["--disable_rel_pos_bias", flag]
    run_class_finetuning.main([*flags, "student."])
    assert "left out   nothing" in capsys.readouterr().out
    assert f"{flag} teacher.: no key begins so; there are student.cls_token" in refused(
        run_class_finetuning.main, [*flags, "teacher."], capsys
    )


@pytest.mark.parametrize(
    "key", ["encoder.blocks.0.attn.q_norm.weight", "decoder.blocks.0.attn.qkv.bias", "encoder.reg_token"]
)
def test_a_tokenizer_of_another_architecture_is_refused(key, tmp_path):
    content = torch.load(tokenizer(tmp_path / "tokenizer.pth"), weights_only=True)
    content["model"][key] = torch.ones(8)
    torch.save(content, tmp_path / "tokenizer.pth")
    with pytest.raises(UserError, match=f"which no tokenizer here computes: it holds {key}"):
        modeling_vqkd.open_tokenizer(str(tmp_path / "tokenizer.pth"))
