"""What of a weight file a model takes: grids of any shape, shared and own bias, prefixes,
and a report of all of it.
"""

import re
from pathlib import Path

import pytest
import safetensors.torch
import timm.layers
import torch
from golden_values import TINY, fill
from refusals import refused, user_reads
from timm.models.beit import Beit
from timm.models.vision_transformer import VisionTransformer as PlainViT
from tiny_runs import SIZE, as_flags, finetuning_flags, photos, tokenizer

import modeling_finetune
import modeling_pretrain
import modeling_vqkd
import pretrained
import run_class_finetuning
import run_linear_eval
from checkpoint_io import huggingface_format, remapping, weight_source
from checkpoint_io.remapping import infer_patch_grid
from errors import UserError
from modeling_finetune import VisionTransformer, remap_pretrained, resize_rel_pos_bias_table
from segmentation import trained_segmenter

ROOT = Path(__file__).parent.parent


def vit(size=64, **settings):
    settings = {
        "use_abs_pos_emb": False,
        "use_rel_pos_bias": True,
        "init_values": 0.1,
        "num_classes": 10,
    } | settings
    return fill(VisionTransformer(**(TINY | {"img_size": size} | settings)), 3).eval()


def shared(size=64):
    model = modeling_pretrain.VisionTransformerForMaskedImageModelingCLS(
        **(TINY | {"img_size": size}), vocab_size=8, use_abs_pos_emb=False, use_shared_rel_pos_bias=True, init_values=0.1,
        early_layers=3,
    )  # fmt: skip
    return fill(model, 4).eval()


@pytest.mark.parametrize("size", [(64, 96), (96, 64), (48, 128), (64, 64)])
def test_the_grid_is_read_from_the_index(size):
    assert infer_patch_grid(vit(size).state_dict()) == (size[0] // 16, size[1] // 16)


def test_a_grid_without_an_index_is_taken_as_square_or_refused():
    weights = {key: value for key, value in vit(96).state_dict().items() if "index" not in key}
    assert infer_patch_grid(weights) == (6, 6)
    weights = {key: value for key, value in vit((64, 112)).state_dict().items() if "index" not in key}
    with pytest.raises(UserError, match="not square"):
        infer_patch_grid(weights)


def test_a_bias_of_rows_alone_stays_so_on_a_grid_not_square():
    """Stretching the columns of a 5 x 5 grid to 9 must not touch the rows, and keeps their order."""
    height = width = 5
    dy = torch.arange(-(height - 1), height).float()
    table = torch.cat(
        (dy[:, None].expand(-1, 2 * width - 1).reshape(-1, 1), torch.tensor([[7.0], [8.0], [9.0]]))
    )
    wide = resize_rel_pos_bias_table(table, (5, 9))
    assert wide.shape == (9 * 17 + 3, 1)
    torch.testing.assert_close(wide[:-3].view(9, 17), dy[:, None].expand(9, 17), atol=1e-5, rtol=0)
    assert wide[-3:].flatten().tolist() == [7, 8, 9]
    tall = resize_rel_pos_bias_table(table, (9, 5), (5, 5))[:-3].view(17, 9)
    assert (tall.diff(dim=0) > 0).all() and torch.allclose(tall, tall[:, :1].expand(-1, 9), atol=1e-5)


def test_square_and_per_axis_resizing_agree():
    table = torch.randn(13 * 13 + 3, 2)
    assert torch.equal(
        resize_rel_pos_bias_table(table, 12), resize_rel_pos_bias_table(table, (12, 12), (7, 7))
    )


@pytest.mark.parametrize("size", [96, (64, 96), (112, 48)])
def test_weights_go_to_another_grid_and_give_finite_logits(size):
    source, target = vit(), vit(size)
    fitting = remap_pretrained(source.state_dict(), target)
    assert set(target.state_dict()) - set(fitting) == {
        k for k in target.state_dict() if k.endswith("position_index")
    }
    target.load_state_dict(fitting, strict=False)
    with torch.no_grad():
        assert target(torch.rand(1, 3, *target.patch_embed.img_size)).isfinite().all()


def test_rows_and_columns_are_told_apart():
    """A 4 x 6 model's tables have as many rows as a 6 x 4 model's: they must be resized all the same."""
    wide, tall = vit((64, 96)), vit((96, 64))
    key = "blocks.0.attn.relative_position_bias_table"
    assert wide.state_dict()[key].shape == tall.state_dict()[key].shape
    assert not torch.equal(remap_pretrained(wide.state_dict(), tall)[key], wide.state_dict()[key])


def test_the_report_names_used_resized_copied_dropped_and_new(capsys):
    source, target = shared(), vit(96)
    weights = {f"module.{key}": value for key, value in source.state_dict().items()}
    fitting = remap_pretrained(weights, target)
    report = remapping.report_remapping(weights, target, fitting)
    text = "\n".join(report)
    assert "resized    4 position tables: 4 x 4 -> 6 x 6 patches" in text
    assert "copied     the shared relative position bias to 4 blocks" in text
    assert "cls_pt_layers.* (30)" in text and "lm_head.weight, lm_head.bias" in text and "mask_token" in text
    assert report[-1] == "new        fc_norm.weight, fc_norm.bias, head.weight, head.bias"
    resized = resize_rel_pos_bias_table(source.state_dict()["rel_pos_bias.relative_position_bias_table"], 6)
    for block in range(4):
        assert torch.equal(fitting[f"blocks.{block}.attn.relative_position_bias_table"], resized)
    unchanged = vit()
    report = remapping.report_remapping(unchanged.state_dict(), unchanged, unchanged.state_dict())
    assert report[-2:] == ["left out   nothing", "new        nothing"] and not any(
        "resized" in line for line in report
    )


def test_weights_of_another_size_are_refused():
    with pytest.raises(
        UserError,
        match=(
            r"--finetune x.pth is no file of ours \(it holds layer1.conv.weight\): none "
            r"of its weights fits"
        ),
    ):
        pretrained.load_fitting(vit(), {"layer1.conv.weight": torch.zeros(3)}, "--finetune x.pth")


@pytest.mark.parametrize(
    "build", [vit, shared, lambda: vit(use_abs_pos_emb=True, use_rel_pos_bias=False, use_mean_pooling=False)]
)
def test_a_backbone_is_rebuilt_from_its_file_alone(build, tmp_path):
    source = build()
    torch.save({"model": source.state_dict()}, tmp_path / "w.pth")
    model, flags = pretrained.open_backbone(str(tmp_path / "w.pth"), num_heads=4)
    assert flags == {}
    x = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        tokens, bias = source.embed(x), source.shared_bias()
        for block in source.blocks:
            tokens = block(tokens, bias)
        torch.testing.assert_close(model.get_intermediate_layers(x)[-1], tokens, atol=1e-6, rtol=1e-5)
    other, _ = pretrained.open_backbone(str(tmp_path / "w.pth"), input_size=(96, 128), num_heads=4)
    assert other.patch_embed.patch_shape == (6, 8)


def test_heads_that_nothing_tells_are_asked_for(tmp_path):
    weights = vit(use_abs_pos_emb=True, use_rel_pos_bias=False).state_dict()
    torch.save({"model": weights}, tmp_path / "w.pth")
    with user_reads("--num_heads"):
        pretrained.open_backbone(str(tmp_path / "w.pth"))
    torch.save({"model": {"conv.weight": torch.zeros(1)}}, tmp_path / "other.pth")
    with user_reads(r"--checkpoint .*no vision transformer"):
        pretrained.open_backbone(str(tmp_path / "other.pth"))


def test_a_tokenizer_is_rebuilt_from_its_file_alone(tmp_path):
    model = modeling_vqkd.create_model(
        "vqkd_encoder_demo_decoder_1x128x4_hog", img_size=48, n_code=24, code_dim=8, as_tokenizer=True
    )
    torch.save({"model": model.state_dict()}, tmp_path / "t.pth")
    opened, _ = modeling_vqkd.open_tokenizer(str(tmp_path / "t.pth"))
    x = torch.rand(2, 3, 48, 48)
    assert torch.equal(opened.get_codebook_indices(x), model.get_codebook_indices(x))


def test_fine_tuning_on_images_that_are_not_square(tmp_path):
    data = photos(tmp_path / "data", per_class=2)
    flags = finetuning_flags(data, tmp_path / "square", "--epochs", "1", "--batch_size", "2")
    run_class_finetuning.main(flags)
    wide = finetuning_flags(
        data, tmp_path / "wide", "--epochs", "1", "--batch_size", "2", "--input_size", "32x64"
    )
    run_class_finetuning.main([*wide, "--finetune", str(tmp_path / "square/checkpoint.pth")])
    weights = torch.load(tmp_path / "wide/checkpoint.pth", weights_only=True)["model"]
    assert infer_patch_grid(weights) == (2, 4)
    run_class_finetuning.main([*wide, "--eval", "--resume", str(tmp_path / "wide/checkpoint.pth")])


def test_hugging_faces_file_is_fine_tuned_from_directly():
    source = vit()
    theirs = huggingface_format.to_huggingface(source.state_dict(), huggingface_format.CLASSIFIER).weights
    assert not theirs.keys() & source.state_dict().keys()
    fitting, target = remap_pretrained(theirs, vit()), source.state_dict()
    assert fitting.keys() == {key for key in target if not key.endswith("position_index")}
    assert all(torch.equal(value, target[key]) for key, value in fitting.items())


def test_a_grid_that_only_looks_square_keeps_its_positions(tmp_path):
    """4 x 16 patches are 64, as are 8 x 8: the model itself, and the flags in its file, say which."""
    source = vit((64, 256), use_abs_pos_emb=True, use_rel_pos_bias=False)
    assert torch.equal(remap_pretrained(source.state_dict(), source)["pos_embed"], source.pos_embed)
    torch.save({"model": source.state_dict(), "args": {"input_size": [64, 256]}}, tmp_path / "w.pth")
    model, _ = pretrained.open_backbone(str(tmp_path / "w.pth"), num_heads=4)
    assert model.patch_embed.patch_shape == (4, 16) and torch.equal(model.pos_embed, source.pos_embed)
    other = remap_pretrained(
        weight_source.read_weights(str(tmp_path / "w.pth")).weights, vit((128, 128), use_abs_pos_emb=True)
    )
    assert not torch.equal(other["pos_embed"], source.pos_embed)


def test_a_single_row_of_patches_is_resized():
    source, target = vit((16, 128)), vit((64, 64))
    key = "blocks.0.attn.relative_position_bias_table"
    table = remap_pretrained(source.state_dict(), target)[key][:-3].view(7, 7, 4)
    assert torch.allclose(table, table[:1].expand(7, 7, 4), atol=1e-5)  # nothing was learned about rows
    assert table.std() > 0


def test_heads_other_than_the_files_are_refused(tmp_path):
    torch.save({"model": vit().state_dict()}, tmp_path / "w.pth")
    with pytest.raises(UserError, match="position tables are of 4 heads"):
        pretrained.open_backbone(str(tmp_path / "w.pth"), num_heads=8)


def test_half_a_file_is_refused(tmp_path):
    weights = {key: value for key, value in vit().state_dict().items() if "blocks.2.mlp" not in key}
    torch.save({"model": weights}, tmp_path / "w.pth")
    with pytest.raises(UserError, match="incomplete: it lacks blocks"):
        pretrained.open_backbone(str(tmp_path / "w.pth"))


@pytest.mark.parametrize("kind", ["VQ-KD tokenizer", "linear probe"])
def test_mixed_up_files_are_called_by_their_name(kind, tmp_path, capsys):
    data = photos(tmp_path / "data", per_class=1)
    path = tokenizer(tmp_path / "w.pth")
    if kind == "linear probe":
        torch.save({"model": {"heads.0.weight": torch.zeros(2, 2)}}, path)
    assert f"--finetune {path} is a {kind}" in refused(
        run_class_finetuning.main, finetuning_flags(data, tmp_path / "out", "--finetune", str(path)), capsys
    )


def test_resuming_from_another_kind_of_model_says_what_it_is(tmp_path, capsys):
    data = photos(tmp_path / "data", per_class=1)
    torch.save({"model": shared().state_dict()}, tmp_path / "pt.pth")
    assert "is a model of masked image modeling (for --finetune) of another shape" in refused(
        run_class_finetuning.main,
        finetuning_flags(data, tmp_path / "out", "--resume", str(tmp_path / "pt.pth")),
        capsys,
    )


def test_a_folder_of_hugging_face_is_fine_tuned_from(tmp_path, capsys):
    data = photos(tmp_path / "data", per_class=1)
    theirs = huggingface_format.to_huggingface(
        vit(32, embed_dim=128, depth=6).state_dict(), huggingface_format.CLASSIFIER
    ).weights
    (tmp_path / "hf").mkdir()
    safetensors.torch.save_file(theirs, tmp_path / "hf/model.safetensors")
    run_class_finetuning.main(
        finetuning_flags(data, tmp_path / "out", "--finetune", str(tmp_path / "hf"), "--epochs", "1")
    )
    assert "new        head.weight, head.bias" in capsys.readouterr().out


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
    """Its bias of q, k and v, its layer scale or that it has none, and positions of the patches alone."""
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


def test_the_readmes_python_runs(tmp_path, monkeypatch):
    """As it stands, on weights of the demo's sizes in the places that it names."""
    monkeypatch.chdir(tmp_path)
    for stage in ("pretrain", "vqkd"):
        (tmp_path / "demo_output" / stage).mkdir(parents=True)
    student = modeling_pretrain.create_model(
        "beit_demo_patch16_128_8k_vocab_cls_pt", vocab_size=16, use_abs_pos_emb=False,
        use_shared_rel_pos_bias=True, init_values=0.1, early_layers=4, head_layers=1,
    )  # fmt: skip
    torch.save({"model": student.state_dict(), "args": {}}, "demo_output/pretrain/checkpoint.pth")
    codes = modeling_vqkd.create_model(
        "vqkd_encoder_demo_decoder_1x128x4_hog", n_code=16, code_dim=8, as_tokenizer=True
    )
    torch.save({"model": codes.state_dict()}, "demo_output/vqkd/checkpoint.pth")

    readme = (ROOT / "README.md").read_text()
    (snippet,) = re.findall(r"```python\n(.*?)```", readme, flags=re.DOTALL)
    names = {}
    exec(snippet, names)
    for name, shape in (("features", (2, 128)), ("patches", (2, 64, 128)), ("codes", (2, 64))):
        assert names[name].shape == shape
        assert str(shape) in next(line for line in snippet.splitlines() if line.startswith(f"{name} = "))
