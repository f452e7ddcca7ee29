"""Runs that start from weights (--init_from): at first the model computes what its
source does, whoever made it; what the source lacks is new, and may learn first.
"""

import subprocess
import sys

import pytest
import torch
from refusals import refused
from safetensors.torch import load_file
from timm.models.beit import Beit
from timm.models.vision_transformer import VisionTransformer as PlainViT
from tiny_runs import (
    assert_same_weights,
    checkpoint,
    finetuning_flags,
    kill_after,
    log_lines,
    pretraining_flags,
    student,
    tokenizer,
    vqkd_flags,
)

import modeling_vqkd
import pretrained
import run_beitv2_pretraining
import run_class_finetuning
import run_vqkd_training
from flags import pretraining, vqkd

IMAGES = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
MADE = {"img_size": 32, "patch_size": 16, "embed_dim": 128, "depth": 6, "num_heads": 4, "num_classes": 2}
PLAIN = ["--model", "beit_demo_patch16_128_8k_vocab"]  # without the CLS head


def timm_file(path, kind=PlainViT, **settings):
    """The model and its file, of weights that are not near 0."""
    torch.manual_seed(0)
    model = kind(**(MADE | settings)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    torch.save(model.state_dict(), path)
    return model


def built_student(data, codes, source, *more):
    flags = pretraining_flags(data, "", codes, "--init_from", str(source), *more)
    return run_beitv2_pretraining.build(pretraining.parse_flags(flags))


def built_tokenizer(data, source, *more):
    return run_vqkd_training.build(vqkd.parse_flags(vqkd_flags(data, "", "--init_from", str(source), *more)))


def patch_features(model):
    """Normalized patch tokens (B, N, C) of a pretraining model."""
    with torch.no_grad():
        found = model.eval()(IMAGES, return_patch_tokens=True)
    return found[0] if isinstance(found, tuple) else found


def timm_features(model):
    with torch.no_grad():
        return model.fc_norm(model.forward_features(IMAGES))[:, 1:]


def exactly(mine, theirs):
    torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=1e-6)


KINDS = {
    "plain ViT": {},
    "plain ViT with layer scale": {"init_values": 0.1},
    "plain ViT, mean of patches": {"global_pool": "avg", "fc_norm": True},
    "BEiT of timm": {
        "kind": Beit,
        "use_abs_pos_emb": False,
        "use_rel_pos_bias": True,
        "init_values": 0.1,
    },
    "BEiT of timm, shared bias": {
        "kind": Beit,
        "use_abs_pos_emb": True,
        "use_shared_rel_pos_bias": True,
        "init_values": 0.1,
        "global_pool": "token",
    },
}


@pytest.mark.parametrize("head", [[], PLAIN], ids=["cls head", "plain"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_student_starts_with_the_features_of_timm(kind, head, data, tokenizer_weight, tmp_path):
    source = timm_file(tmp_path / "w.pth", **KINDS[kind])
    model = built_student(data, tokenizer_weight, tmp_path / "w.pth", *head).state.model
    exactly(patch_features(model), timm_features(source))


@pytest.mark.parametrize("kind", KINDS)
def test_an_encoder_starts_with_the_features_of_timm(kind, data, tmp_path):
    source = timm_file(tmp_path / "w.pth", **KINDS[kind], depth=4)
    encoder = built_tokenizer(data, tmp_path / "w.pth").state.model.encoder.eval()
    with torch.no_grad():
        exactly(encoder.forward_features(IMAGES, return_patch_tokens=True), timm_features(source))


@pytest.mark.slow
def test_a_student_starts_with_the_features_of_transformers(data, tokenizer_weight, tmp_path):
    """Made and asked in a process of its own: transformers takes our `datasets` for
    Hugging Face's.
    """
    code = """if True:
    import torch
    from safetensors.torch import save_file
    from transformers import BeitConfig, BeitModel
    sizes = {"image_size": 32, "hidden_size": 128, "num_hidden_layers": 6, "num_attention_heads": 4}
    config = BeitConfig(**sizes, intermediate_size=512, use_relative_position_bias=True,
                        use_mean_pooling=False)
    torch.manual_seed(0)
    model = BeitModel(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained("hf")
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        save_file({"features": model(images).last_hidden_state.contiguous()}, "features.safetensors")
    """
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    model = built_student(data, tokenizer_weight, tmp_path / "hf").state.model
    features = load_file(tmp_path / "features.safetensors")["features"][:, 1:]
    exactly(patch_features(model), features)
    torch.save({"model": model.state_dict()}, tmp_path / "pt.pth")  # with the epsilon of its norms, 1e-12
    backbone, _ = pretrained.open_backbone(str(tmp_path / "pt.pth"))
    exactly(backbone.forward_features(IMAGES, return_patch_tokens=True), features)


def test_our_own_checkpoints_go_on_with_all_that_fits(data, tokenizer_weight, tmp_path, capsys):
    """One of pretraining with every tensor, one of fine-tuning with a bias in each
    block.
    """
    source = student(tmp_path / "pt.pth")
    model = built_student(data, tokenizer_weight, source).state.model
    weights = checkpoint(source)["model"]
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
    assert "new        nothing" in capsys.readouterr().out
    run_class_finetuning.main(finetuning_flags(data, tmp_path / "ft"))
    model = built_student(data, tokenizer_weight, tmp_path / "ft/checkpoint.pth").state.model
    tuned = checkpoint(tmp_path / "ft/checkpoint.pth")["model"]
    key = "blocks.5.attn.relative_position_bias_table"
    assert torch.equal(model.state_dict()[key], tuned[key])
    assert model.rel_pos_bias is None
    assert torch.equal(model.norm.weight, tuned["fc_norm.weight"])


def test_another_grid_and_codebook_are_said(data, tokenizer_weight, tmp_path, capsys):
    timm_file(tmp_path / "w.pth", img_size=64)
    model = built_student(data, tokenizer_weight, tmp_path / "w.pth").state.model
    said = capsys.readouterr().out
    assert "resized    1 position table: 4 x 4 -> 2 x 2 patches" in said
    assert "head.weight" in said.split("left out")[1].splitlines()[0]
    new = said.split("new        ")[1].splitlines()[0]
    for name in ("mask_token", "lm_head.weight", "cls_pt_layers", "rel_pos_bias"):
        assert name in new
    assert not model.rel_pos_bias.relative_position_bias_table.any()
    other = student(tmp_path / "pt.pth")
    content = checkpoint(other)
    content["model"]["lm_head.weight"] = torch.ones(8, 128)
    torch.save(content, other)
    built_student(data, tokenizer_weight, other)
    assert "new        lm_head.weight" in capsys.readouterr().out


def test_a_head_of_another_tokenizer_is_new(data, tokenizer_weight, tmp_path, capsys):
    """It would fit: there are as many codes, which mean something else."""
    run_beitv2_pretraining.main(pretraining_flags(data, tmp_path / "pt", tokenizer_weight))
    source = tmp_path / "pt/checkpoint.pth"
    head = checkpoint(source)["model"]["lm_head.weight"]
    same = built_student(data, tokenizer_weight, source).state.model
    assert torch.equal(same.lm_head.weight, head)
    capsys.readouterr()
    other = built_student(data, tokenizer(tmp_path / "other.pth"), source).state.model
    assert not torch.equal(other.lm_head.weight, head)
    said = capsys.readouterr().out
    assert "left out   lm_head.weight, lm_head.bias: they predict another tokenizer's codes" in said


# ── which parts learn, and how fast ──


def changed(first, second):
    """Names of the tensors that differ between two checkpoints of one run."""
    one, two = checkpoint(first)["model"], checkpoint(second)["model"]
    return {key for key in one if not torch.equal(one[key], two[key])}


def test_only_new_parts_learn_in_the_frozen_epochs(data, tokenizer_weight, tmp_path):
    source = timm_file(tmp_path / "w.pth")
    flags = pretraining_flags(data, tmp_path / "out", tokenizer_weight, "--init_from", tmp_path / "w.pth")
    more = ["--freeze_epochs", "1", "--save_ckpt_freq", "1", "--weight_decay", "0.5", "--warmup_epochs", "0"]
    run_beitv2_pretraining.main([*map(str, flags), *more])
    first = checkpoint(tmp_path / "out/checkpoint-0.pth")["model"]
    for key in ("blocks.0.mlp.fc1.weight", "norm.weight", "cls_token", "pos_embed"):
        assert torch.equal(first[key], source.state_dict()[key]), key
    learned = changed(tmp_path / "out/checkpoint-0.pth", tmp_path / "out/checkpoint-1.pth")
    assert {"blocks.0.mlp.fc1.weight", "norm.weight", "pos_embed", "lm_head.weight"} <= learned
    assert first["rel_pos_bias.relative_position_bias_table"].any()  # starts at 0


def test_an_encoder_stays_while_the_rest_learns(data, tmp_path):
    source = timm_file(tmp_path / "w.pth", depth=4)
    more = ["--init_from", str(tmp_path / "w.pth"), "--freeze_epochs", "1", "--save_ckpt_freq", "1"]
    run_vqkd_training.main(vqkd_flags(data, tmp_path / "out", *more, "--warmup_epochs", "0"))
    first = checkpoint(tmp_path / "out/checkpoint-0.pth")["model"]
    for key in ("blocks.0.mlp.fc1.weight", "patch_embed.proj.weight"):
        assert torch.equal(first[f"encoder.{key}"], source.state_dict()[key]), key
    learned = changed(tmp_path / "out/checkpoint-0.pth", tmp_path / "out/checkpoint-1.pth")
    assert {"encoder.blocks.0.mlp.fc1.weight", "decoder.blocks.0.mlp.fc1.weight"} <= learned


@pytest.mark.parametrize("trunk", ["", "encoder."])
def test_early_layers_learn_slower(trunk, data, tokenizer_weight, tmp_path):
    timm_file(tmp_path / "w.pth", depth=4 if trunk else 6)
    build = built_tokenizer if trunk else built_student
    codes = [] if trunk else [tokenizer_weight]
    state = build(data, *codes, tmp_path / "w.pth", "--layer_decay", "0.5").state
    names = {id(parameter): name for name, parameter in state.model.named_parameters()}
    groups = state.optimizer.param_groups
    scales = {names[id(p)]: group["lr_scale"] for group in groups for p in group["params"]}
    last = 3 if trunk else 5
    assert scales[f"{trunk}blocks.{last}.mlp.fc1.weight"] == 0.5
    assert scales[f"{trunk}blocks.0.mlp.fc1.weight"] == 0.5 ** (last + 1)
    assert scales[f"{trunk}patch_embed.proj.weight"] == 0.5 ** (last + 2)
    for head in ("decode_task_layer.2.weight", "decoder.blocks.0.mlp.fc1.weight", "quantize"):
        assert scales.get(head, 1.0) == 1.0
    assert scales.get("lm_head.weight", 1.0) == scales.get("cls_pt_layers.0.mlp.fc1.weight", 1.0) == 1.0


@pytest.mark.slow
def test_a_run_from_weights_resumes_bit_for_bit(data, tokenizer_weight, tmp_path, monkeypatch):
    timm_file(tmp_path / "w.pth", Beit, use_rel_pos_bias=True, init_values=0.1, use_abs_pos_emb=False)
    more = ["--init_from", str(tmp_path / "w.pth"), "--freeze_epochs", "1", "--layer_decay", "0.7"]
    more += ["--save_ckpt_steps", "2"]
    run_beitv2_pretraining.main(pretraining_flags(data, tmp_path / "whole", tokenizer_weight, *more))
    flags = pretraining_flags(data, tmp_path / "broken", tokenizer_weight, *more)
    kill_after(2, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        run_beitv2_pretraining.main(flags)
    monkeypatch.undo()
    run_beitv2_pretraining.main(flags)
    assert_same_weights(tmp_path / "whole/checkpoint.pth", tmp_path / "broken/checkpoint.pth")


def test_a_resumed_run_without_its_beginning_says_so(data, tokenizer_weight, tmp_path, capsys):
    """Where only new parts learned at first, and where layers learn at rates of their
    own, the optimizer has other groups.
    """
    timm_file(tmp_path / "w.pth")
    start, freeze, decay = (
        ["--init_from", str(tmp_path / "w.pth")],
        ["--freeze_epochs", "1"],
        ["--layer_decay", "0.7"],
    )
    flags = pretraining_flags(data, tmp_path / "out", tokenizer_weight)
    run_beitv2_pretraining.main([*flags, *start, *freeze, *decay])
    for more, sentence in (
        ([*start, *decay], "--freeze_epochs 1 (now 0)"),
        ([*start, *freeze], "--layer_decay 0.7 (now 1.0)"),
        (decay, f"--freeze_epochs 1 (now 0), --init_from {tmp_path / 'w.pth'} (now none)"),
    ):
        error = refused(run_beitv2_pretraining.main, [*flags, *more], capsys)
        assert f"checkpoint.pth was trained with {sentence}, so its weights or its optimizer" in error


# ── what comes of it ──


def test_a_tokenizer_with_a_bias_opens_and_teaches(data, tmp_path):
    """Its encoder has the positions of the BEiT that it started from."""
    timm_file(tmp_path / "w.pth", Beit, depth=4, use_rel_pos_bias=True, init_values=0.1)
    run_vqkd_training.main(vqkd_flags(data, tmp_path / "vqkd", "--init_from", str(tmp_path / "w.pth")))
    file = tmp_path / "vqkd/checkpoint.pth"
    opened, _ = modeling_vqkd.open_tokenizer(str(file))
    weights = checkpoint(file)["model"]
    key = "encoder.blocks.0.attn.relative_position_bias_table"
    assert torch.equal(opened.state_dict()[key], weights[key])
    assert "encoder.blocks.0.gamma_1" in opened.state_dict()
    run_beitv2_pretraining.main(pretraining_flags(data, tmp_path / "pt", file))
    assert len(log_lines(tmp_path / "pt")) == 2
    run_vqkd_training.main(
        vqkd_flags(data, "", "--eval", "--resume", str(file), "--eval_data_path", str(data))
    )


def test_an_encoder_starts_from_that_of_another_tokenizer(data, tmp_path, capsys):
    file = tokenizer(tmp_path / "t.pth")
    trained = built_tokenizer(data, file).state.model
    weights = checkpoint(file)["model"]
    assert "its codes and decoder are new" in capsys.readouterr().out
    for key, value in trained.encoder.state_dict().items():
        assert torch.equal(value, weights[f"encoder.{key}"])


REFUSED = {
    "freeze_epochs 1 acts on the weights of --init_from": ["--freeze_epochs", "1"],
    "freeze_epochs 2 is the whole run": ["--init_from", "pt.pth", "--freeze_epochs", "2"],
    "freeze_epochs 1: --init_from gives all parts": ["--init_from", "pt.pth", "--freeze_epochs", "1"],
    "leave out --disable_rel_pos_bias": ["--init_from", "pt.pth", "--disable_rel_pos_bias"],
    "give --layer_scale_init_value 0.1": ["--init_from", "pt.pth", "--layer_scale_init_value", "0"],
    "name the --model": ["--init_from", "pt.pth", "--model", "beit_tiny_patch16_224_8k_vocab"],
    "is a VQ-KD tokenizer": ["--init_from", "tokenizer.pth"],
    "nowhere.pth": ["--init_from", "nowhere.pth"],
}


@pytest.mark.parametrize("says", REFUSED)
def test_a_start_that_is_not_meant_is_refused(says, data, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    student(tmp_path / "pt.pth")
    flags = pretraining_flags(data, "", tokenizer(tmp_path / "tokenizer.pth"), *REFUSED[says])
    assert says in refused(run_beitv2_pretraining.main, flags, capsys)


def test_an_evaluation_or_a_pixel_decoder_starts_from_nothing(data, tmp_path, capsys):
    source = ["--init_from", str(student(tmp_path / "pt.pth"))]
    file = str(tokenizer(tmp_path / "t.pth"))
    flags = vqkd_flags(data, "", "--eval", "--resume", file, "--eval_data_path", str(data), *source)
    assert "--init_from" in refused(run_vqkd_training.main, flags, capsys)
    flags = ["--data_path", str(data), "--train_pixel_decoder", "--tokenizer_weight", file, *source]
    assert "--init_from has no effect" in refused(run_vqkd_training.main, flags, capsys)


def test_another_normalization_is_warned_of(data, tokenizer_weight, tmp_path, capsys):
    source = student(tmp_path / "pt.pth", imagenet_default_mean_and_std=True)
    built_student(data, tokenizer_weight, source)
    assert "was trained on images of mean (0.485, " in capsys.readouterr().out
    built_student(data, tokenizer_weight, source, "--imagenet_default_mean_and_std")
    assert "was trained on images of" not in capsys.readouterr().out
