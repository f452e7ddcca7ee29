"""What of a weight file a model takes: grids of any shape, shared and own bias,
prefixes, and a report of all of it.
"""

import re
from pathlib import Path

import pytest
import safetensors.torch
import torch
from golden_values import TINY, fill, vit
from PIL import Image
from refusals import refused, user_reads
from tiny_runs import finetuning_flags, photos, tokenizer

import modeling_pretrain
import modeling_vqkd
import pretrained
import run_class_finetuning
from checkpoint_io import huggingface_format, remapping, weight_source
from checkpoint_io.remapping import infer_patch_grid
from errors import UserError
from modeling_finetune import remap_pretrained, resize_rel_pos_bias_table

ROOT = Path(__file__).parent.parent


def shared(size=64):
    model = modeling_pretrain.VisionTransformerForMaskedImageModelingCLS(
        **(TINY | {"img_size": size}),
        vocab_size=8,
        use_abs_pos_emb=False,
        use_shared_rel_pos_bias=True,
        init_values=0.1,
        early_layers=3,
    )
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
    """Stretching the columns of a 5 x 5 grid to 9 must not touch the rows, and keeps
    their order.
    """
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
    """A 4 x 6 model's tables have as many rows as a 6 x 4 model's: they must be resized
    all the same.
    """
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
            r"--finetune x.pth is not a file of ours \(it holds layer1.conv.weight\): none "
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
    """4 x 16 patches are 64, as are 8 x 8: the model itself, and the flags in its file,
    say which.
    """
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

    for name in ("a.jpg", "b.jpg"):
        Image.new("RGB", (160, 144)).save(name)

    readme = (ROOT / "README.md").read_text()
    (snippet,) = re.findall(r"```python\n(.*?)```", readme, flags=re.DOTALL)
    names = {}
    exec(snippet.replace('load("."', f'load("{ROOT}"'), names)
    for name, shape in (("features", (2, 128)), ("patches", (2, 64, 128)), ("codes", (2, 64))):
        assert names[name].shape == shape
        assert str(shape) in next(line for line in snippet.splitlines() if line.startswith(f"{name} = "))
