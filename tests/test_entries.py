"""The three scripts, as main([...]), on tiny data: what they write, that they learn,
and that they resume exactly.
"""

import math
import shutil

import golden_values
import pytest
import torch
from refusals import refused
from tiny_runs import (
    as_flags,
    assert_same_weights,
    checkpoint,
    finetuning_flags,
    kill_after,
    log_lines,
    photos,
    pretraining_flags,
    spoil_loss,
    vqkd_flags,
)

import run_beitv2_pretraining
import run_class_finetuning
import run_vqkd_training
import visualize_attention


def stage(name, data, codes, out, *more):
    """(main, flags) of a stage, all with the same tiny settings."""
    if name == "vqkd":
        flags = ["--quantize_kmeans_init", "--revive_dead_codes", *more]
        return run_vqkd_training.main, vqkd_flags(data, out, *flags)
    if name == "pretrain":
        return run_beitv2_pretraining.main, pretraining_flags(data, out, codes, "--drop_path", "0.1", *more)
    mixed = ["--mixup", "0.8", "--cutmix", "1.0", "--model_ema", "--model_ema_decay", "0.9"]
    return run_class_finetuning.main, finetuning_flags(data, out, *mixed, *more)


STAGES = ("vqkd", "pretrain", "finetune")
CURVES = golden_values.data("loss_curves")


@pytest.mark.parametrize("name", STAGES)
def test_what_a_run_leaves_behind(name, data, tokenizer_weight, tmp_path):
    main, flags = stage(
        name, data, tokenizer_weight, tmp_path / "out", "--save_ckpt_freq", "1", "--image_freq", "1"
    )
    main(flags)
    lines = log_lines(tmp_path / "out")
    assert [line["epoch"] for line in lines] == [0, 1]
    assert all(math.isfinite(value) for line in lines for value in line.values())
    content = checkpoint(tmp_path / "out" / "checkpoint.pth")
    assert {"model", "optimizer", "scaler", "epoch", "args"} <= content.keys()
    assert content["epoch"] == 1
    assert content["args"]["batch_size"] == 4
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"checkpoint.pth", "checkpoint-0.pth", "checkpoint-1.pth", "log.txt"} <= names
    assert any(name.startswith("events.out.tfevents") for name in names)
    assert not any(name.endswith(".part") for name in names)
    if name == "finetune":
        assert {"test_acc1", "test_ema_acc1", "test_balanced_acc"} <= lines[0].keys()
        assert lines[0]["test_images"] == 16
        assert (tmp_path / "out" / "checkpoint-best.pth").exists()
        assert "model_ema" in content
        assert list((tmp_path / "out" / "pictures").glob("confident_errors-*.png"))
    assert list((tmp_path / "out" / "pictures").glob("*.png"))
    if name == "pretrain":
        assert {"train_loss", "train_mlm_acc_1", "train_mlm_acc_2", "train_majority_code_share"} <= lines[
            0
        ].keys()
    if name == "vqkd":
        assert {"train_loss", "train_codes_used", "train_perplexity"} <= lines[0].keys()


@pytest.mark.parametrize("name", STAGES)
def test_seeded_loss_curves_guard_refactors(name, data, tokenizer_weight, tmp_path):
    """Update tests/golden/loss_curves.json only when a change of the numbers is meant,
    and say so in the commit.
    """
    if not torch.__version__.startswith(CURVES["torch"]):
        pytest.skip(f"random numbers differ between versions of torch; the curves are of {CURVES['torch']}")
    main, flags = stage(name, data, tokenizer_weight, tmp_path, "--epochs", "3")
    main(flags)
    assert [line["train_loss"] for line in log_lines(tmp_path)] == pytest.approx(CURVES[name], rel=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize("name", STAGES)
@pytest.mark.parametrize("stop_after", ["epoch", "middle of an epoch"])
def test_a_resumed_run_ends_bit_for_bit_as_an_undisturbed_one(
    name, stop_after, data, tokenizer_weight, tmp_path, monkeypatch
):
    main, flags = stage(name, data, tokenizer_weight, tmp_path / "whole")
    main(flags)

    steps = 4 if stop_after == "epoch" else 6  # of 4 per epoch
    main, flags = stage(name, data, tokenizer_weight, tmp_path / "broken", "--save_ckpt_steps", "2")
    kill_after(steps, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        main(flags)
    monkeypatch.undo()
    main(flags)
    assert_same_weights(tmp_path / "whole/checkpoint.pth", tmp_path / "broken/checkpoint.pth")
    whole, broken = log_lines(tmp_path / "whole"), log_lines(tmp_path / "broken")
    assert [line["train_loss"] for line in whole] == [line["train_loss"] for line in broken]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pretrain", "finetune"])
def test_accumulation_equals_the_large_batch(name, data, tokenizer_weight, tmp_path):
    """Two micro-batches of 4 and one batch of 8 see the same samples and take the same
    steps.
    """
    more = ["--epochs", "1", "--warmup_epochs", "0", "--drop_path", "0"]
    more += ["--mixup", "0", "--cutmix", "0"] if name == "finetune" else []
    main, small = stage(name, data, tokenizer_weight, tmp_path / "small", *more, "--update_freq", "2")
    main(small)
    _, large = stage(name, data, tokenizer_weight, tmp_path / "large", *more, "--batch_size", "8")
    main(large)
    losses = [log_lines(tmp_path / out)[0]["train_loss"] for out in ("small", "large")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_the_tokenizer_trains_with_accumulation_too(data, tmp_path):
    """Its codebook moves at every micro-batch, so the curve is not that of one large
    batch.
    """
    run_vqkd_training.main(vqkd_flags(data, tmp_path, "--update_freq", "2"))
    lines = log_lines(tmp_path)
    assert lines[-1]["train_rec_loss"] < lines[0]["train_rec_loss"]


@pytest.mark.slow
def test_fine_tuning_learns_stripes_and_evaluates_what_it_saved(data, tmp_path, capsys):
    plain = [
        *as_flags(aa="none", reprob=0, min_crop_scale=0.8, layer_decay="1.0", drop_path=0),
    ]
    flags = finetuning_flags(
        data, tmp_path, "--epochs", "20", *plain, "--eval_freq", "10", "--init_scale", "1.0"
    )
    run_class_finetuning.main(flags)
    lines = log_lines(tmp_path)
    best = max(line["test_acc1"] for line in lines if "test_acc1" in line)
    assert best >= 80  # two classes
    assert lines[-1]["train_loss"] < lines[0]["train_loss"]
    run_class_finetuning.main([*flags, "--eval", "--resume", str(tmp_path / "checkpoint-best.pth")])
    assert f"test_acc1 {best:.4g}" in capsys.readouterr().out


@pytest.mark.slow
def test_tokenizer_pretraining_and_fine_tuning_fit_together(data, tmp_path, capsys):
    run_vqkd_training.main(
        vqkd_flags(data, tmp_path / "vqkd", "--quantizer_warmup_steps", "3", "--epochs", "6")
    )
    assert "codes_used" in capsys.readouterr().out
    weights = tmp_path / "vqkd/checkpoint.pth"
    run_beitv2_pretraining.main(
        pretraining_flags(data, tmp_path / "pt", weights, "--eval_data_path", str(data))
    )
    assert "test_mlm_acc_1" in log_lines(tmp_path / "pt")[0]
    run_class_finetuning.main(
        finetuning_flags(data, tmp_path / "ft", "--finetune", str(tmp_path / "pt/checkpoint.pth"))
    )
    out = capsys.readouterr().out
    assert "used       " in out
    assert "head.weight" in out.split("new        ")[1].splitlines()[0]
    photo = next(data.rglob("*.jpg"))
    for source in ("pt", "ft"):
        target = tmp_path / f"{source}.png"
        visualize_attention.main(
            [
                "--checkpoint",
                str(tmp_path / source / "checkpoint.pth"),
                "--image",
                str(photo),
                "--output",
                str(target),
                "--query",
                "1,1",
            ]
        )
        assert target.stat().st_size > 500


def test_pretraining_with_absolute_positions_and_no_cls_head(data, tokenizer_weight, tmp_path):
    more = [
        *as_flags(
            model="beit_demo_patch16_128_8k_vocab", abs_pos_emb=True, disable_rel_pos_bias=True, epochs=1
        ),
    ]
    run_beitv2_pretraining.main(pretraining_flags(data, tmp_path, tokenizer_weight, *more))
    assert "train_mlm_acc" in log_lines(tmp_path)[0]
    keys = checkpoint(tmp_path / "checkpoint.pth")["model"].keys()
    assert "pos_embed" in keys
    assert not any("relative" in key or "cls_pt" in key for key in keys)


def test_a_folder_smaller_than_a_batch_is_one_step_an_epoch(data, tokenizer_weight, tmp_path, capsys):
    run_beitv2_pretraining.main(
        pretraining_flags(data, tmp_path, tokenizer_weight, "--batch_size", "128", "--warmup_epochs", "10")
    )
    out = capsys.readouterr().out
    assert "16 images do not fill one batch" in out
    assert "the learning rate only rises" in out
    assert len(log_lines(tmp_path)) == 2


@pytest.mark.slow
def test_ten_steps_not_finite_end_the_run_and_change_nothing(
    data, tokenizer_weight, tmp_path, monkeypatch, capsys
):
    out = tmp_path / "out"
    run_beitv2_pretraining.main(pretraining_flags(data, out, tokenizer_weight, "--epochs", "1"))
    shutil.copy(out / "checkpoint.pth", tmp_path / "good.pth")
    spoil_loss(monkeypatch, run_beitv2_pretraining.PretrainingStage)
    with pytest.raises(SystemExit) as stop:
        run_beitv2_pretraining.main(
            pretraining_flags(data, out, tokenizer_weight, "--epochs", "20", "--print_freq", "1")
        )
    assert stop.value.code == 2
    captured = capsys.readouterr()
    assert "10 steps in a row, up to step 13" in captured.err
    assert "step 4 was skipped" in captured.out
    # epochs 2 and 3 ended with all their steps skipped: weights and optimizer are those
    # of epoch 1
    good, last = checkpoint(tmp_path / "good.pth"), checkpoint(out / "checkpoint.pth")
    assert all(torch.equal(good["model"][key], last["model"][key]) for key in good["model"])
    state = good["optimizer"]["state"][0], last["optimizer"]["state"][0]
    assert torch.equal(state[0]["exp_avg"], state[1]["exp_avg"])


@pytest.mark.parametrize("opt", ["adamw", "lamb", "sgd"])
def test_one_bad_step_is_skipped_and_named_and_the_run_goes_on(
    opt, data, tokenizer_weight, tmp_path, monkeypatch, capsys
):
    spoil_loss(monkeypatch, run_beitv2_pretraining.PretrainingStage, math.inf, steps=[1])
    run_beitv2_pretraining.main(pretraining_flags(data, tmp_path, tokenizer_weight, "--opt", opt))
    out = capsys.readouterr().out
    assert "step 1 was skipped" in out
    assert out.count("was skipped") == 1
    assert all(
        torch.isfinite(value).all() for value in checkpoint(tmp_path / "checkpoint.pth")["model"].values()
    )
    assert all(math.isfinite(line["train_loss"]) for line in log_lines(tmp_path))


def test_fp16_scales_the_loss(data, tokenizer_weight, tmp_path):
    run_beitv2_pretraining.main(
        pretraining_flags(data, tmp_path, tokenizer_weight, "--amp_dtype", "fp16", "--epochs", "1")
    )
    assert checkpoint(tmp_path / "checkpoint.pth")["scaler"]["scale"] > 0
    assert log_lines(tmp_path)[0]["train_loss_scale"] > 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--finetune", "/nowhere/weights.pth"], "/nowhere/weights.pth"),
        (["--nb_classes", "7"], "--nb_classes 7"),
        (["--model", "beit_demo_patch16_12"], "did you mean beit_demo_patch16_128"),
        (["--opt", "adamv"], "--opt adamv"),
        (["--warmup_steps", "8"], "--warmup_steps 8 is as long as the run of 8 steps"),
        (["--eval"], "--resume"),
    ],
)
def test_a_users_mistake_is_one_line(flags, message, data, tmp_path, capsys):
    error = refused(run_class_finetuning.main, finetuning_flags(data, tmp_path, *flags), capsys)
    assert message in error
    assert "Traceback" not in error


def test_another_codebook_is_refused_with_the_right_flags(data, tokenizer_weight, tmp_path, capsys):
    assert "--codebook_size 16 --codebook_dim 8" in refused(
        run_beitv2_pretraining.main,
        pretraining_flags(data, tmp_path, tokenizer_weight, "--codebook_size", "32"),
        capsys,
    )


def test_a_tokenizer_of_another_size_is_refused(data, tokenizer_weight, tmp_path, capsys):
    more = ["--input_size", "64", "--second_input_size", "64", "--num_mask_patches", "6"]
    assert "--second_input_size 32" in refused(
        run_beitv2_pretraining.main, pretraining_flags(data, tmp_path, tokenizer_weight, *more), capsys
    )


def test_too_many_broken_files_stop_the_run(tokenizer_weight, tmp_path, capsys):
    broken = photos(tmp_path / "broken", per_class=30)
    for path in sorted(broken.rglob("*.jpg"))[::4]:
        path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(SystemExit):
        run_beitv2_pretraining.main(pretraining_flags(broken, tmp_path / "out", tokenizer_weight))
    captured = capsys.readouterr()
    assert "cannot be read" in captured.err
    assert ".jpg" in captured.err
    assert "using the next image" in captured.out


def test_sgd_survives_a_bad_first_step(data, tokenizer_weight, tmp_path, monkeypatch):
    spoil_loss(monkeypatch, run_beitv2_pretraining.PretrainingStage, steps=[0])
    run_beitv2_pretraining.main(
        pretraining_flags(data, tmp_path, tokenizer_weight, "--opt", "sgd", "--lr", "1e-4")
    )
    weights = checkpoint(tmp_path / "checkpoint.pth")["model"]
    assert all(value.abs().max() < 10 for key, value in weights.items() if "index" not in key)


def test_a_warm_up_that_leaves_no_codebook_is_refused(data, tmp_path, capsys):
    assert "--quantizer_warmup_steps 100" in refused(
        run_vqkd_training.main, vqkd_flags(data, tmp_path, "--quantizer_warmup_steps", "100"), capsys
    )


def test_a_tokenizer_without_a_codebook_is_refused(data, tokenizer_weight, tmp_path, capsys):
    content = checkpoint(tokenizer_weight)
    content["model"]["quantize.embedding.initted"].zero_()
    torch.save(content, tmp_path / "empty.pth")
    assert "never given a codebook" in refused(
        run_beitv2_pretraining.main, pretraining_flags(data, tmp_path / "out", tmp_path / "empty.pth"), capsys
    )


def test_the_tokenizers_own_normalization_is_used_in_pretraining(data, tmp_path):
    import arguments

    run_vqkd_training.main(vqkd_flags(data, tmp_path, "--process_type", "imagenet_norm", "--epochs", "1"))
    flags = pretraining_flags(data, tmp_path / "pt", tmp_path / "checkpoint.pth")
    tokenizer_used = run_beitv2_pretraining.build_tokenizer(
        arguments.parse(run_beitv2_pretraining.get_parser(), flags)
    )
    assert tokenizer_used.input_mean.flatten().tolist() == pytest.approx([0.485, 0.456, 0.406])


def test_evaluation_alone_needs_no_training_images(data, tmp_path, capsys):
    run_class_finetuning.main(finetuning_flags(data, tmp_path / "ft", "--epochs", "1"))
    alone = finetuning_flags("/nowhere", tmp_path / "eval", "--eval_data_path", str(data), "--eval")
    run_class_finetuning.main([*alone, "--resume", str(tmp_path / "ft/checkpoint.pth")])
    assert (tmp_path / "eval/eval.json").exists()
    run_vqkd_training.main(vqkd_flags(data, tmp_path / "vq", "--epochs", "1", "--quantize_kmeans_init"))
    # released tokenizers carry their teacher along
    content = checkpoint(tmp_path / "vq/checkpoint.pth")
    content["model"]["teacher.conv1.weight"] = torch.zeros(1)
    torch.save({"model": content["model"]}, tmp_path / "released.pth")
    capsys.readouterr()
    flags = vqkd_flags(
        "/nowhere", tmp_path / "vq2", "--eval_data_path", str(data), "--calculate_codebook_usage"
    )
    run_vqkd_training.main([*flags, "--resume", str(tmp_path / "released.pth")])
    assert "unused codes:" in capsys.readouterr().out
    assert len((tmp_path / "vq2/codebook_usage.txt").read_text().split()) == 16


def test_held_out_loss_does_not_depend_on_the_batch_size(data, tokenizer_weight, tmp_path):
    losses = []
    for size in ("3", "16"):
        flags = pretraining_flags(
            data,
            tmp_path / size,
            tokenizer_weight,
            "--eval_data_path",
            str(data),
            "--epochs",
            "1",
            "--lr",
            "0",
        )
        run_beitv2_pretraining.main([*flags, "--min_lr", "0", "--batch_size", size])
        losses.append(log_lines(tmp_path / size)[0]["test_loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.slow
def test_flags_give_settings_and_the_checkpoint_gives_moments(data, tokenizer_weight, tmp_path, capsys):
    run_beitv2_pretraining.main(pretraining_flags(data, tmp_path, tokenizer_weight, "--epochs", "1"))
    run_beitv2_pretraining.main(
        pretraining_flags(data, tmp_path, tokenizer_weight, "--opt_betas", "0.9", "0.98")
    )
    state = checkpoint(tmp_path / "checkpoint.pth")["optimizer"]
    assert tuple(state["param_groups"][0]["betas"]) == (0.9, 0.98)
    assert float(state["state"][0]["step"]) == 8
    assert "go on with --opt adamw" in refused(
        run_beitv2_pretraining.main,
        pretraining_flags(data, tmp_path, tokenizer_weight, "--opt", "sgd", "--epochs", "3"),
        capsys,
    )


@pytest.mark.slow
def test_an_old_log_is_set_aside_not_mixed_in(data, tokenizer_weight, tmp_path):
    run_beitv2_pretraining.main(pretraining_flags(data, tmp_path, tokenizer_weight, "--epochs", "1"))
    run_beitv2_pretraining.main(
        pretraining_flags(data, tmp_path, tokenizer_weight, "--epochs", "1", "--no_auto_resume")
    )
    assert len(log_lines(tmp_path)) == 1
    assert len(list(tmp_path.glob("log-until-*.txt"))) == 1
