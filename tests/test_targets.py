"""What pretraining predicts: which patches, codes of VQ-KD, or pixels."""

import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from many_processes import two_processes
from tiny_pretraining import BOTH, PLAIN, pixel_flags, pretrain, spy_on_steps
from tiny_runs import (
    as_flags,
    assert_same_weights,
    checkpoint,
    finetuning_flags,
    kill_after,
    log_lines,
    pretraining_flags,
)

import engine_for_pretraining
import modeling_vqkd
import run_beitv2_pretraining
import run_class_finetuning
import visualize_attention


# ── what is predicted ──
def test_of_the_tokenizer_the_run_keeps_what_gives_codes(data, tokenizer_weight, tmp_path):
    flags = run_beitv2_pretraining.parse_flags(pretraining_flags(data, tmp_path, tokenizer_weight))
    target = run_beitv2_pretraining.build(flags).stage.target
    parts = {name.split(".")[0] for name in target.tokenizer.state_dict()}
    assert parts == {"encoder", "encode_task_layer", "quantize"}
    whole = modeling_vqkd.open_tokenizer(str(tokenizer_weight))[0]
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(target.tokenizer.get_codebook_indices(images), whole.get_codebook_indices(images))


@BOTH
def test_predict_all_covers_all_patches(head, data, tokenizer_weight, tmp_path, monkeypatch):
    seen = spy_on_steps(monkeypatch)
    lines = pretrain(
        data,
        tmp_path,
        tokenizer_weight,
        "--predict",
        "all",
        "--epochs",
        "1",
        "--eval_data_path",
        str(data),
        *head,
    )
    stage, batch, outputs, loss, logs = seen[0]
    targets = stage.target.tokenizer.get_codebook_indices(batch["tokenizer_image"])  # (B, N)
    expected = [F.cross_entropy(out.flatten(0, 1), targets.flatten()) for out in outputs]
    assert [out.shape for out in outputs] == [(4, 4, 16)] * (1 if head else 2)
    assert loss == pytest.approx(float(sum(expected)))
    right = outputs[0].argmax(-1) == targets
    ending = "" if head else "_1"
    assert logs[f"all_acc{ending}"] == pytest.approx(float(right.float().mean()))
    assert logs[f"mlm_acc{ending}"] == pytest.approx(float(right[batch["mask"]].float().mean()))
    assert {f"train_all_acc{ending}", f"test_mlm_acc{ending}", f"test_all_acc{ending}"} <= lines[0].keys()
    # four training steps, then those of the evaluation
    counted = sum(step[1]["mask"].numel() for step in seen[:4])
    assert stage.target.code_counts.sum() == counted == 64


def test_only_masked_patches_count_by_default(data, tokenizer_weight, tmp_path, monkeypatch):
    seen = spy_on_steps(monkeypatch)
    lines = pretrain(data, tmp_path, tokenizer_weight, "--epochs", "1")
    stage, batch, outputs, loss, _ = seen[0]
    targets = stage.target.tokenizer.get_codebook_indices(batch["tokenizer_image"])[batch["mask"]]
    assert [out.shape for out in outputs] == [(8, 16)] * 2
    assert loss == pytest.approx(float(sum(F.cross_entropy(out, targets) for out in outputs)))
    assert not any("all_acc" in key for key in lines[0])


def test_no_mask_shows_everything_and_predicts_everything(
    data, tokenizer_weight, tmp_path, monkeypatch, capsys
):
    seen = spy_on_steps(monkeypatch)
    lines = pretrain(
        data,
        tmp_path,
        tokenizer_weight,
        "--no_mask",
        "--num_mask_patches",
        "0",
        *PLAIN,
        "--eval_data_path",
        str(data),
    )
    _, batch, outputs, _, _ = seen[0]
    assert not batch["mask"].any()
    assert outputs[0].shape == (4, 4, 16)
    assert "train_all_acc" in lines[0] and "test_all_acc" in lines[0]
    assert not any("mlm_acc" in key for key in lines[0])
    assert all(np.isfinite(value) for value in lines[1].values())
    assert "target     tokens of all patches, none of them masked" in capsys.readouterr().out


@BOTH
def test_pixels_are_regressed_without_a_tokenizer(head, data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        run_beitv2_pretraining, "build_tokenizer", lambda *_: pytest.fail("a tokenizer was opened")
    )
    seen = spy_on_steps(monkeypatch)
    run_beitv2_pretraining.main(
        pixel_flags(data, tmp_path, "--epochs", "1", "--eval_data_path", str(data), *head)
    )
    _, batch, outputs, loss, _ = seen[0]
    assert "tokenizer_image" not in batch
    patches = []  # by hand: image by image, row by row, each patch flattened as (channel, row, column)
    for image, mask in zip(batch["image"], batch["mask"].view(-1, 2, 2), strict=True):
        for y, x in mask.nonzero().tolist():
            patches.append(image[:, 16 * y : 16 * y + 16, 16 * x : 16 * x + 16].flatten())
    target = torch.stack(patches)
    assert target.shape == (8, 768) == outputs[0].shape
    assert loss == pytest.approx(float(sum((out - target).square().mean() for out in outputs)))
    line = log_lines(tmp_path)[0]
    branches = set() if head else {"train_loss_1", "train_loss_2"}
    assert {"train_loss", "test_loss"} | branches <= line.keys()
    assert not any("acc" in key or "code" in key for key in line)
    weights = checkpoint(tmp_path / "checkpoint.pth")["model"]
    assert weights["lm_head.weight"].shape == (768, 128)
    reason = "nothing here: beit_demo_patch16_128_8k_vocab has no CLS head"
    assert (reason in capsys.readouterr().out) == bool(head)


def test_pixels_are_normalized_by_flag_and_predicted_everywhere(data, tmp_path, monkeypatch):
    seen = spy_on_steps(monkeypatch)
    more = [
        *as_flags(imagenet_default_mean_and_std=True, predict="all"),
        *PLAIN,
        *as_flags(image_freq=1, epochs=1),
    ]
    run_beitv2_pretraining.main(pixel_flags(data, tmp_path, *more))
    stage, batch, outputs, loss, logs = seen[0]
    assert outputs[0].shape == (4, 4, 768)
    assert stage.target.encode(batch).shape == (16, 768)
    grid = stage.target.encode(batch).view(4, 2, 2, 3, 16, 16).permute(0, 3, 1, 4, 2, 5).reshape(4, 3, 32, 32)
    assert torch.equal(grid, batch["image"])
    assert logs == {}
    assert loss == pytest.approx(
        float((outputs[0].flatten(0, 1) - stage.target.encode(batch)).square().mean())
    )


def test_the_picture_shows_image_mask_and_pasted_prediction(data, tmp_path):
    run_beitv2_pretraining.main(pixel_flags(data, tmp_path, "--image_freq", "1", "--epochs", "1"))
    assert [path.name for path in (tmp_path / "pictures").iterdir()] == ["masked_pixels-0000.png"]
    mean_std = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
    target = engine_for_pretraining.Pixels(2, mean_std)
    image = torch.rand(3, 4, 4)
    values = target.encode({"image": (image[None] - 0.5) / 0.5})
    answered = values.clone()
    answered[1] = 0.0  # the upper right patch in mid-gray
    (picture,) = target.pictures(values, answered, (2, 2), (4, 4))
    expected = image.clone()
    expected[:, :2, 2:] = 0.5
    assert torch.allclose(picture, expected, atol=1e-6)
    (larger,) = target.pictures(values, answered, (2, 2), (8, 8))  # as large as the enlarged image beside it
    assert torch.equal(larger[:, ::2, ::2], picture)


def test_captions_count_the_codes_that_were_found():
    target = engine_for_pretraining.Tokens(None, 8, torch.device("cpu"))
    codes = torch.tensor([1, 2, 3, 4])
    assert target.captions(codes, torch.tensor([1, 0, 3, 0])) == ["target codes", "predicted 2/4"]


@pytest.mark.slow
@pytest.mark.parametrize("stop_after", [4, 6])  # of 4 steps per epoch
def test_a_resumed_pixel_run_is_exact(stop_after, data, tmp_path, monkeypatch):
    whole, broken = (pixel_flags(data, tmp_path / name, "--drop_path", "0.1") for name in ("whole", "broken"))
    run_beitv2_pretraining.main(whole)
    kill_after(stop_after, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        run_beitv2_pretraining.main([*broken, "--save_ckpt_steps", "2"])
    monkeypatch.undo()
    run_beitv2_pretraining.main([*broken, "--save_ckpt_steps", "2"])
    assert_same_weights(tmp_path / "whole/checkpoint.pth", tmp_path / "broken/checkpoint.pth")
    assert [line["train_loss"] for line in log_lines(tmp_path / "whole")] == [
        line["train_loss"] for line in log_lines(tmp_path / "broken")
    ]


@pytest.mark.slow
def test_a_run_goes_on_with_its_own_task_alone(data, tokenizer_weight, tmp_path, capsys):
    pretrain(data, tmp_path, tokenizer_weight, "--epochs", "1")
    for more, sentence in (
        (
            ["--predict", "all"],
            "trained on the tokens of masked patches, this run is on the tokens of all patches",
        ),
        (["--no_mask", "--num_mask_patches", "0"], "none of them masked: go on with the same --target"),
        (["--target", "pixels"], "trained with --target tokens (now pixels), so its weights"),
    ):
        with pytest.raises(SystemExit):
            pretrain(data, tmp_path, tokenizer_weight, *more)
        assert sentence in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes_follow_the_curve_of_one(data, tokenizer_weight, tmp_path):
    """All that is unusual at once: no tokenizer, empty masks (the mask token has no
    gradient), all patches, held-out images.
    """
    flags = [
        *as_flags(target="pixels", no_mask=True, num_mask_patches=0, drop_path=0, eval_data_path=data),
    ]
    two_processes(
        "run_beitv2_pretraining.py", pretraining_flags(data, tmp_path / "two", tokenizer_weight, *flags)
    )
    lines = pretrain(data, tmp_path / "one", tokenizer_weight, *flags, "--batch_size", "8")
    for two, one in zip(log_lines(tmp_path / "two"), lines, strict=True):
        for key in one.keys() - {"seconds"}:
            assert two[key] == pytest.approx(one[key], rel=1e-3, abs=1e-3), key


def test_a_pixel_run_is_fine_tuned_and_looked_at(data, tmp_path, capsys):
    run_beitv2_pretraining.main(pixel_flags(data, tmp_path / "pt", "--epochs", "1"))
    weights = tmp_path / "pt/checkpoint.pth"
    run_class_finetuning.main(
        finetuning_flags(data, tmp_path / "ft", "--finetune", str(weights), "--epochs", "1")
    )
    assert re.search("left out   .*lm_head.weight", capsys.readouterr().out)
    picture, photo = tmp_path / "attention.png", next(data.rglob("*.jpg"))
    visualize_attention.main(["--checkpoint", str(weights), "--image", str(photo), "--output", str(picture)])
    assert picture.exists()
