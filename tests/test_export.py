"""Exported weights compute the same in timm and come back bit for bit; what they bring
along; what cannot be exported. transformers: test_export_transformers.py.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from golden_values import TINY, close, fill, images
from safetensors.torch import load_file, save_file
from timm.models._hub import has_hf_hub
from timm.models.beit import Beit
from tiny_exports import (
    BLOCK_BIAS,
    CLASSIFIERS,
    CLOSE,
    FLAGS,
    HEADS,
    assert_same,
    classifier,
    export,
    inputs,
    pretraining,
    save,
)

import export_checkpoint
import modeling_finetune
from checkpoint_io import huggingface_format, remapping
from data_pipeline.imagenet_classes import synsets
from transforms import IMAGENET_MEAN, eval_view

# ── timm ──


# Folders are read and written by timm's own hub code, which in old releases does not
# know the new huggingface_hub.
timms_hub = pytest.mark.skipif(
    not has_hf_hub(), reason="this timm does not work with the installed huggingface_hub"
)


@timms_hub
@pytest.mark.parametrize("case", CLASSIFIERS)
def test_timm_computes_the_same_logits(case, tmp_path):
    model = classifier(case)
    folder = export(save(model, tmp_path / "ft.pth"), "timm", tmp_path / "timm", *HEADS)
    theirs = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    with torch.no_grad():
        close(theirs(inputs()), model(inputs()), CLOSE)
    assert (folder / "model.safetensors").stat().st_mode == (folder / "config.json").stat().st_mode
    config = json.loads((folder / "config.json").read_text())
    alone = Beit(**config["model_args"])
    alone.load_state_dict(load_file(folder / "model.safetensors"))
    assert config["num_classes"] == 10
    assert theirs.pretrained_cfg["mean"] == list(IMAGENET_MEAN)
    assert theirs.pretrained_cfg["crop_pct"] == 0.875


@timms_hub
def test_timm_takes_a_pretrained_transformer_without_its_heads(tmp_path, capsys):
    model = pretraining()
    folder = export(save(model, tmp_path / "pt.pth"), "timm", tmp_path / "timm")
    said = capsys.readouterr().out
    assert "left out   mask_token, lm_head.weight, lm_head.bias, cls_pt_layers.* (" in said
    assert "given to each of the 4 blocks" in said
    theirs = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    with torch.no_grad():
        close(theirs.forward_features(inputs())[:, 1:], model(inputs(), return_patch_tokens=True)[0], CLOSE)
    shared = model.rel_pos_bias.relative_position_bias_table
    assert all(torch.equal(block.attn.relative_position_bias_table, shared) for block in theirs.blocks)


@pytest.mark.slow
def test_timm_s_own_base_model_loads_the_file_strictly(tmp_path):
    settings = dict(num_classes=10, use_rel_pos_bias=True, use_abs_pos_emb=False, init_values=0.1)
    model = fill(modeling_finetune.create_model("beit_base_patch16_224", **settings), seed=3).eval()
    path = export(save(model, tmp_path / "base.pth"), "timm", tmp_path / "base.safetensors")
    theirs = timm.create_model("beitv2_base_patch16_224", num_classes=10)
    theirs.load_state_dict(load_file(path), strict=True)
    x = (images(1, 224, 4) - 0.5) / 0.5
    with torch.no_grad():
        close(theirs.eval()(x), model(x), CLOSE)
    assert json.loads((tmp_path / "base.json").read_text())["architecture"] == "beitv2_base_patch16_224"


def test_images_that_are_not_square_go_to_timm_and_back(tmp_path):
    model = fill(
        modeling_finetune.VisionTransformer(**TINY | BLOCK_BIAS | {"img_size": (32, 64)}, num_classes=3),
        seed=1,
    ).eval()
    folder = export(save(model, tmp_path / "wide.pth"), "timm", tmp_path / "timm")
    theirs = Beit(**json.loads((folder / "config.json").read_text())["model_args"]).eval()
    theirs.load_state_dict(load_file(folder / "model.safetensors"))
    x = images(2, 64, 2)[:, :, :32]
    with torch.no_grad():
        close(theirs(x), model(x), CLOSE)
    back = export(folder, "safetensors", tmp_path / "back.safetensors")
    assert_same(load_file(back), model.state_dict())


# ── And back ──


@timms_hub
@pytest.mark.parametrize("case", CLASSIFIERS)
def test_weights_come_back_from_timm_bit_for_bit(case, tmp_path):
    mine = classifier(case).state_dict()
    folder = export(save(classifier(case), tmp_path / "ft.pth"), "timm", tmp_path / "timm", *HEADS)
    theirs = timm.create_model(f"local-dir:{folder}", pretrained=True)
    timm.models.save_for_hf(theirs, tmp_path / "saved", safe_serialization=True)
    shared = mine.pop("rel_pos_bias.relative_position_bias_table", None)
    index = mine.pop("rel_pos_bias.relative_position_index", None)
    for block in range(4 if shared is not None else 0):
        own = f"blocks.{block}.attn.relative_position_bias_table"
        mine[own] = mine[own] + shared if own in mine else shared
        mine[f"blocks.{block}.attn.relative_position_index"] = index
    for source in (folder, tmp_path / "saved"):
        assert_same(load_file(export(source, "safetensors", tmp_path / "back.safetensors")), mine)


def test_a_demo_model_gets_its_name_and_keeps_its_flags(tmp_path):
    settings = BLOCK_BIAS | {"img_size": 64, "num_classes": 2}
    model = fill(modeling_finetune.create_model("beit_demo_patch16_128", **settings), seed=2)
    hf = export(
        save(model, tmp_path / "ft.pth", model_ema=fill(model, 4).state_dict()),
        "huggingface",
        tmp_path / "hf",
        "--ema",
    )
    path = export(hf, "safetensors", tmp_path / "back.safetensors")
    assert_same(load_file(path), model.state_dict())  # filled again: these are the averaged weights
    source = export_checkpoint.weight_source.read_weights(str(path))
    assert source.flags["model"] == "beit_demo_patch16_128"
    assert source.flags["imagenet_default_mean_and_std"] is True
    assert source.flags["crop_pct"] is None  # what is cropped is what our evaluation crops
    assert eval_view(64, source.flags["crop_pct"]).steps.transforms[0].size == 73


def test_our_names_stay_as_they_are():
    for model in (classifier("both"), pretraining()):
        assert_same(remapping.to_our_names(model.state_dict()), model.state_dict())


def test_another_size_resizes_the_tables(tmp_path):
    model = classifier("mean")
    hf = export(save(model, tmp_path / "ft.pth"), "huggingface", tmp_path / "hf", "--input_size", "96")
    larger = modeling_finetune.VisionTransformer(**TINY | BLOCK_BIAS | {"img_size": 96}, num_classes=10)
    larger.load_state_dict(modeling_finetune.remap_pretrained(model.state_dict(), larger), strict=False)
    assert json.loads((hf / "config.json").read_text())["image_size"] == 96
    assert json.loads((hf / "preprocessor_config.json").read_text())["size"] == {
        "shortest_edge": int(96 / 0.875)
    }
    assert_same(load_file(export(hf, "safetensors", tmp_path / "back.safetensors")), larger.state_dict())


def test_a_head_that_predicts_pixels_is_none_of_hugging_face_s(tmp_path, capsys):
    source = tmp_path / "pt.pth"
    torch.save({"model": pretraining().state_dict(), "args": FLAGS | {"target": "pixels"}}, source)
    folder = export(source, "huggingface", tmp_path / "hf")
    assert json.loads((folder / "config.json").read_text())["architectures"] == ["BeitModel"]
    assert "lm_head.weight" in capsys.readouterr().out
    flags = ("--architecture", "BeitForMaskedImageModeling")
    assert "BeitModel fits it" in refusal(capsys, source, "huggingface", tmp_path / "no", *flags)


# ── What cannot be done ──


def refusal(capsys, source: Path, to: str, output: Path, *flags: str) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit):
        export(source, to, output, *flags)
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    assert not output.exists() or output == source
    return said


def test_mistakes_end_in_one_sentence(tmp_path, capsys):
    ft, pt = save(classifier("mean"), tmp_path / "ft.pth"), save(pretraining(), tmp_path / "pt.pth")
    out = tmp_path / "out"
    cases = [
        ((ft, "safetensors", out), "ends in .safetensors or .pth"),
        ((ft, "huggingface", tmp_path / "out.safetensors"), "name a folder"),
        ((ft, "timm", out, "--architecture", "BeitModel"), "--architecture names a class of Hugging Face"),
        (
            (ft, "huggingface", out, "--architecture", "BeitForMaskedImageModeling"),
            "BeitForImageClassification fits it",
        ),
        (
            (pt, "huggingface", out, "--architecture", "BeitForImageClassification"),
            "BeitForMaskedImageModeling fits it",
        ),
        ((ft, "huggingface", out, "--ema"), "no moving average"),
        ((ft, "huggingface", out, "--from", "huggingface"), "--from auto"),
        (
            (ft, "huggingface", out, "--model", "beit_base_patch16_224"),
            "--model beit_base_patch16_224 is not what",
        ),
        ((ft, "huggingface", out, "--model", "beit_base_patch16_22"), "did you mean beit_base_patch16_224"),
        ((ft, "huggingface", out, "--input_size", "65"), "--input_size"),
        ((ft, "huggingface", out, "--input_size", "64x32"), "only square"),
        ((pt, "huggingface", out, "--class_names", "imagenet-1k"), "no classifier"),
        ((ft, "huggingface", out, "--class_names", "imagenet-1k"), "1000 names, the classifier 10 classes"),
        ((ft, "huggingface", out, "--class_names", str(tmp_path / "none.txt")), "cannot be read"),
        ((ft, "safetensors", ft), "would overwrite"),
        ((ft, "safetensors", ft / "below.safetensors"), "cannot be written"),
        ((ft, "timm", ft / "below"), "cannot be written"),
        ((tmp_path, "timm", out), "a folder without model.safetensors or pytorch_model.bin"),
    ]
    for arguments, words in cases:
        assert words in refusal(capsys, *arguments)


def test_other_models_are_told_apart(tmp_path, capsys):
    vit = tmp_path / "vit"
    hf = export(save(classifier("mean"), tmp_path / "ft.pth"), "huggingface", vit)
    config = json.loads((hf / "config.json").read_text())
    (hf / "config.json").write_text(json.dumps(config | {"model_type": "vit"}))
    assert "not a BEiT" in refusal(capsys, hf, "timm", tmp_path / "out")
    torch.save({"conv.weight": torch.zeros(3)}, tmp_path / "cnn.pth")
    assert "and no vision transformer" in refusal(capsys, tmp_path / "cnn.pth", "timm", tmp_path / "out")
    torch.save(
        timm.create_model("vit_tiny_patch16_224", qk_norm=True).state_dict(), tmp_path / "timm_vit.pth"
    )
    assert "are normalized (blocks.0.attn.q_norm.weight)" in refusal(
        capsys, tmp_path / "timm_vit.pth", "timm", tmp_path / "out"
    )
    weights = {
        key: value for key, value in classifier("mean").state_dict().items() if key != "blocks.2.norm1.bias"
    }
    torch.save({"model": weights}, tmp_path / "part.pth")
    assert "it lacks blocks.2.norm1.bias" in refusal(capsys, tmp_path / "part.pth", "timm", tmp_path / "out")


def test_a_hugging_face_segmentation_backbone_leaves_its_head(tmp_path, capsys):
    model = classifier("mean")
    weights = huggingface_format.to_huggingface(model.state_dict(), huggingface_format.CLASSIFIER).weights
    weights = {
        key: value.clone() for key, value in weights.items() if key.startswith(("beit.emb", "beit.enc"))
    }
    save_file(weights | {"decode_head.classifier.weight": torch.zeros(3)}, tmp_path / "segmenter.safetensors")
    back = export(tmp_path / "segmenter.safetensors", "safetensors", tmp_path / "back.safetensors")
    said = capsys.readouterr().out
    assert "left out   decode_head.classifier.weight" in said
    assert "the last norm, which the file lacks" in said
    theirs = load_file(back)
    assert all(
        torch.equal(theirs[key], value)
        for key, value in model.state_dict().items()
        if key.startswith("blocks")
    )


def test_a_tokenizer_only_changes_its_container(tmp_path, capsys):
    weights = {"quantize.embedding.weight": torch.rand(4, 2), "encoder.cls_token": torch.rand(1, 1, 8)}
    torch.save({"model": weights}, tmp_path / "tokenizer.pth")
    assert "timm has no such model" in refusal(capsys, tmp_path / "tokenizer.pth", "timm", tmp_path / "out")
    path = tmp_path / "tokenizer.safetensors"
    assert "--class_names" in refusal(
        capsys, tmp_path / "tokenizer.pth", "safetensors", path, "--class_names", "imagenet-1k"
    )
    assert_same(load_file(export(tmp_path / "tokenizer.pth", "safetensors", path)), weights)


@pytest.mark.parametrize(
    "text", ["tench\ngoldfish\n", '["tench", "goldfish"]', '{"1": "goldfish", "0": "tench"}']
)
def test_class_names_from_a_file(text, tmp_path):
    (tmp_path / "names").write_text(text)
    assert export_checkpoint.read_class_names(str(tmp_path / "names"), 2) == ["tench", "goldfish"]


def test_published_classifiers_know_imagenet(tmp_path):
    model = modeling_finetune.VisionTransformer(**TINY | BLOCK_BIAS, num_classes=1000)
    torch.save({"model": model.state_dict()}, tmp_path / "beitv2_base_patch16_224_pt1k_ft1k.pth")
    hf = export(tmp_path / "beitv2_base_patch16_224_pt1k_ft1k.pth", "huggingface", tmp_path / "hf")
    assert json.loads((hf / "config.json").read_text())["id2label"]["0"] == "tench"
    content = torch.load(export(hf, "safetensors", tmp_path / "back.pth"), weights_only=True)
    assert content["stage"]["classes"] == synsets()  # as the folders are called
    assert np.allclose(json.loads((hf / "preprocessor_config.json").read_text())["image_mean"], IMAGENET_MEAN)
