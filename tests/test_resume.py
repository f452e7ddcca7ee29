"""What a run may go on from: a checkpoint whose every part fits, of the same run;
everything else is refused or named.
"""

import argparse
import copy
import re
import shutil

import pytest
import torch
from refusals import refused
from tiny_runs import assert_same_weights, checkpoint, finetuning_flags, log_lines, photos, spoil_loss

import engine
import run_class_finetuning
from checkpoint_io import checkpoints, resumption
from checkpoint_io.optimizer_state import check_saved_state
from data_pipeline.image_lists import find_classes_folder
from datasets import ImageFiles
from errors import UserError
from transforms import eval_view


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    """Two epochs of four steps, with a moving average."""
    out = tmp_path_factory.mktemp("finished")
    run_class_finetuning.main(
        finetuning_flags(data, out, "--model_ema", "--save_ckpt_steps", "1", "--keep_ckpts", "9")
    )
    return out


def spoil_moments(content, key, change):
    """`change` the moments `key` of the parameter of most numbers."""
    states = content["optimizer"]["state"].values()
    moments = max(states, key=lambda each: each["exp_avg"].numel())
    moments[key] = change(moments[key])


FAULTS = {
    "another shape": (
        lambda c: spoil_moments(c, "exp_avg", lambda v: v.flatten()[:3].clone()),
        r"exp_avg of \S+ has the shape",
    ),
    "one number": (
        lambda c: spoil_moments(c, "exp_avg_sq", lambda v: torch.ones(1)),
        r"exp_avg_sq of \S+ has the shape \[1\]",
    ),
    "integers": (
        lambda c: spoil_moments(c, "exp_avg", torch.Tensor.long),
        r"exp_avg of \S+ is of torch.int64",
    ),
    "not finite": (
        lambda c: spoil_moments(c, "exp_avg", lambda v: v * float("nan")),
        r"exp_avg of \S+ holds .* not finite",
    ),
    "below zero": (
        lambda c: spoil_moments(c, "exp_avg_sq", lambda v: v - 1),
        r"exp_avg_sq of \S+ is below zero",
    ),
    "no tensor": (lambda c: spoil_moments(c, "exp_avg", lambda v: "text"), r"exp_avg of \S+ is not a tensor"),
    "no count": (
        lambda c: spoil_moments(c, "step", lambda v: torch.tensor(float("nan"))),
        r"step of \S+ is not a count",
    ),
    "many counts": (
        lambda c: spoil_moments(c, "step", lambda v: torch.ones(7)),
        r"step of \S+ is not a count",
    ),
    "a moment gone": (lambda c: c["optimizer"]["state"][3].pop("exp_avg"), r"exp_avg of \S+ is missing"),
    "a group gone": (lambda c: c["optimizer"]["param_groups"].pop(), r"groups of parameters"),
    "a parameter gone": (
        lambda c: c["optimizer"]["param_groups"][0]["params"].pop(),
        r"parameters in group 0",
    ),
    "another order": (
        lambda c: c["optimizer"]["param_groups"][0]["params"].reverse(),
        "numbers its parameters",
    ),
    "no optimizer": (lambda c: c.update(optimizer=[1]), "its optimizer is not the state of one"),
    "average of another shape": (
        lambda c: c["model_ema"].update({"head.bias": torch.zeros(7)}),
        r"head.bias differs",
    ),
    "integer weights": (
        lambda c: c["model"].update({"head.bias": torch.zeros(2).long()}),
        r"head.bias is of torch.int64",
    ),
    "no step": (lambda c: c["next"].pop("step"), "not a complete training checkpoint"),
    "steps below zero": (lambda c: c["next"].update(step=-5), "not a complete training checkpoint"),
    "means of something": (lambda c: c.update(means=3), "not a complete training checkpoint"),
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_a_resumed_state_that_does_not_fit_is_refused_by_name(fault, finished, data, tmp_path, capsys):
    change, says = FAULTS[fault]
    content = checkpoint(finished / "checkpoint-step5.pth")
    change(content)
    torch.save(content, tmp_path / "spoiled.pth")
    error = refused(
        run_class_finetuning.main,
        finetuning_flags(data, "", "--model_ema", "--resume", str(tmp_path / "spoiled.pth")),
        capsys,
    )
    assert "spoiled.pth" in error
    assert re.search(says, error), error


def test_resumed_moments_are_laid_out_like_their_parameters(finished, data, tmp_path):
    """One tensor twice, and transposed: the fused kernels take each for a row of
    numbers of its own.
    """
    content = checkpoint(finished / "checkpoint-step5.pth")
    for moments in content["optimizer"]["state"].values():
        backwards = torch.rand(moments["exp_avg"].shape[::-1])
        moments["exp_avg"] = moments["exp_avg_sq"] = backwards.permute(*reversed(range(backwards.dim())))
    torch.save(content, tmp_path / "odd.pth")
    for moments in content["optimizer"]["state"].values():
        moments["exp_avg"], moments["exp_avg_sq"] = (
            moments["exp_avg"].contiguous().clone(),
            moments["exp_avg"].contiguous().clone(),
        )
    torch.save(content, tmp_path / "plain.pth")
    for name in ("odd", "plain"):
        run_class_finetuning.main(
            finetuning_flags(data, tmp_path / name, "--resume", str(tmp_path / f"{name}.pth"))
        )
    assert_same_weights(tmp_path / "odd/checkpoint.pth", tmp_path / "plain/checkpoint.pth")


@pytest.mark.parametrize("opt", ["adafactor", "lion", "lamb"])
def test_moments_of_timm_optimizers_are_checked_by_a_step(opt, capsys):
    import timm.optim

    layer = torch.nn.Linear(40, 50)
    groups = [{"name": "all", "params": list(layer.parameters())}]
    optimizer = timm.optim.create_optimizer_v2(groups, opt=opt, lr=1e-3, filter_bias_and_bn=False)
    layer(torch.randn(2, 40)).sum().backward()
    optimizer.step()
    names = {id(p): name for name, p in layer.named_parameters()}
    saved = copy.deepcopy(optimizer.state_dict())
    check_saved_state(saved, optimizer, names, "file")
    key = next(
        key
        for key, value in saved["state"][0].items()
        if isinstance(value, torch.Tensor) and value.numel() > 1
    )
    saved["state"][0][key] = torch.zeros(3, 3)
    with pytest.raises(UserError, match=r"file: the optimizer's \w+ of weight has the shape \[3, 3\]"):
        check_saved_state(saved, optimizer, names, "file")


# ── only what is good is kept ──


@pytest.mark.parametrize("where", ["model", "model_ema", "optimizer"])
def test_a_state_that_is_not_finite_replaces_no_checkpoint(where, tmp_path):
    good = {
        "model": {"w": torch.ones(2)},
        "model_ema": {"w": torch.ones(2)},
        "optimizer": {"state": {0: {"w": torch.ones(2)}}},
    }
    saver = checkpoints.Saver()
    saver.submit(good, tmp_path, ["checkpoint.pth"])
    saver.wait()
    bad = copy.deepcopy(good)
    next(checkpoints.named_tensors(bad[where]))[1][1] = float("inf")
    saver.submit(bad, tmp_path, ["checkpoint.pth", "checkpoint-best.pth"])
    with pytest.raises(
        UserError, match=(rf"{where}\.\S*w is not finite .* the last good checkpoint is " r".*checkpoint.pth")
    ):
        saver.wait()
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pth"]
    assert all(
        bool(torch.isfinite(tensor).all())
        for _, tensor in checkpoints.named_tensors(checkpoint(tmp_path / "checkpoint.pth"))
    )


def test_exploding_weights_end_the_run_and_keep_a_checkpoint(data, tmp_path, monkeypatch, capsys):
    def explode(state, clip_grad):
        norm = take_step(state, clip_grad)
        if state.step == 2:
            state.parameters[0].data.mul_(float("inf"))
        return norm

    take_step = engine.take_step
    monkeypatch.setattr(engine, "take_step", explode)
    error = refused(
        run_class_finetuning.main, finetuning_flags(data, tmp_path, "--save_ckpt_steps", "1"), capsys
    )
    assert "is not finite any more" in error
    kept = checkpoint(tmp_path / "checkpoint.pth")
    assert kept["next"]["step"] == 2
    assert all(
        bool(torch.isfinite(value).all()) for value in kept["model"].values() if value.is_floating_point()
    )
    assert not (tmp_path / "checkpoint-best.pth").exists()


def test_a_run_that_skips_each_step_is_no_success(data, tmp_path, monkeypatch, capsys):
    """Eight steps, fewer than the ten in a row that end a run at once."""
    spoil_loss(monkeypatch, run_class_finetuning.FinetuningStage)
    assert "each of the 8 steps of this run" in refused(
        run_class_finetuning.main, finetuning_flags(data, tmp_path), capsys
    )


# ── the same run ──


def test_other_images_or_another_seed_are_refused_unless_allowed(finished, data, tmp_path, capsys):
    fewer = photos(tmp_path / "fewer", per_class=6)
    from_here = ["--resume", str(finished / "checkpoint-step5.pth")]
    error = refused(run_class_finetuning.main, finetuning_flags(fewer, tmp_path / "out", *from_here), capsys)
    assert re.search(r"checkpoint-step5.pth is of a run on 16 images, not 12: .* --allow_changed_run", error)
    error = refused(
        run_class_finetuning.main, finetuning_flags(data, tmp_path / "out", *from_here, "--seed", "7"), capsys
    )
    assert "--seed 0, not 7" in error
    run_class_finetuning.main(
        finetuning_flags(fewer, tmp_path / "out", *from_here, "--seed", "7", "--allow_changed_run")
    )
    out = capsys.readouterr().out
    assert "warning: the checkpoint is of a run on 16 images, not 12" in out
    assert "warning: the checkpoint is of a run on --seed 0, not 7" in out
    assert checkpoint(tmp_path / "out/checkpoint.pth")["data"]["images"] == 12


def test_moved_images_are_the_same_unless_names_or_labels_change(data, tmp_path):
    def digest(folder):
        samples, classes = find_classes_folder(str(folder))
        return ImageFiles(samples, eval_view(32), classes=classes).digest(str(folder))

    moved = shutil.copytree(data, tmp_path / "elsewhere/photos")
    assert digest(moved) == digest(data)
    (moved / "a/0.jpg").rename(moved / "a/other.jpg")
    assert digest(moved) != digest(data)
    (moved / "a/other.jpg").rename(moved / "b/90.jpg")
    assert digest(moved) != digest(data)


def test_what_changes_the_result_is_named_and_used(finished, data, tmp_path, capsys):
    more = ["--lr", "5e-4", "--epochs", "3", "--weight_decay", "0.1", "--print_freq", "1"]
    capsys.readouterr()
    run_class_finetuning.main(
        finetuning_flags(data, tmp_path, *more, "--resume", str(finished / "checkpoint.pth"))
    )
    changed = [
        line.split(maxsplit=1)[1]
        for line in capsys.readouterr().out.splitlines()
        if line.startswith("changed ")
    ]
    names = [
        "--epochs: 2 -> 3",
        "--lr: 0.001 -> 0.0005",
        "--model_ema: True -> False",
        "--weight_decay: 0.05 -> 0.1",
    ]
    assert changed == names
    assert log_lines(tmp_path)[-1]["epoch"] == 2


OTHER_SHAPES = {
    "abs_pos_emb False (now True)": ["--abs_pos_emb"],
    "rel_pos_bias True (now False)": ["--disable_rel_pos_bias"],
    "in_chans 3 (now 1)": ["--in_chans", "1"],
    "input_size 32 (now 48)": ["--input_size", "48"],
    "model beit_demo_patch16_128 (now beit_tiny_patch16_224)": ["--model", "beit_tiny_patch16_224"],
}


@pytest.mark.parametrize("sentence", OTHER_SHAPES)
def test_what_no_longer_fits_names_the_flag(sentence, finished, data, capsys):
    more = [*OTHER_SHAPES[sentence], "--resume", str(finished / "checkpoint.pth")]
    error = refused(run_class_finetuning.main, finetuning_flags(data, "", *more), capsys)
    assert f"{finished / 'checkpoint.pth'} was trained with --{sentence}, so its weights" in error


def test_a_flag_that_is_left_out_is_none(caplog):
    flags = {"finetune": "x.pth", "cooldown_from": ""}
    with caplog.at_level("INFO", logger="beit"):
        resumption.check_same_run({"args": {"finetune": "", "cooldown_from": "y"}}, flags, {}, "c.pth")
    changed = "changed    --cooldown_from: y -> none", "changed    --finetune: none -> x.pth"
    assert [record.getMessage() for record in caplog.records] == list(changed)


def test_how_classes_are_weighed_may_change_in_between(finished, data, tmp_path, capsys):
    more = ["--class_weights", "balanced", "--schedule", "wsd", "--layer_decay", "0.5"]
    more += ["--epochs", "3", "--resume", str(finished / "checkpoint-step5.pth")]
    for sampler in ([], ["--balanced_sampler"]):
        weights = more[2:] if sampler else more  # one of the two at a time
        run_class_finetuning.main(finetuning_flags(data, tmp_path, *weights, *sampler))
        said = capsys.readouterr().out
        assert f"changed    --{'balanced_sampler: False' if sampler else 'class_weights: none'} -> " in said
        assert "changed    --layer_decay: 0.8 -> 0.5" in said
        assert "changed    --schedule: cosine -> wsd" in said


def test_a_checkpoint_of_earlier_code_resumes(finished, data, tmp_path, capsys):
    """Without the images' digest, and with the means of rank 0 alone."""
    content = checkpoint(finished / "checkpoint-step5.pth")
    del content["data"]
    content["means"] = content["means"][0]
    torch.save(content, tmp_path / "earlier.pth")
    flags = finetuning_flags(data, tmp_path / "out", "--model_ema", "--resume", str(tmp_path / "earlier.pth"))
    run_class_finetuning.main([*flags, "--seed", "0"])
    assert_same_weights(tmp_path / "out/checkpoint.pth", finished / "checkpoint.pth")


@pytest.mark.parametrize("step", [3, 4, 8])
def test_the_log_is_that_of_the_undisturbed_run(step, finished, data, tmp_path):
    """4 and 8: behind an epoch's last step, before its line in log.txt."""
    shutil.copy(finished / f"checkpoint-step{step}.pth", tmp_path / "checkpoint.pth")
    lines = (finished / "log.txt").read_text().splitlines(keepends=True)
    (tmp_path / "log.txt").write_text("".join(lines[: (step - 1) // 4]))
    run_class_finetuning.main(finetuning_flags(data, tmp_path, "--model_ema"))
    told = [
        [{k: v for k, v in line.items() if k != "seconds"} for line in log_lines(out)]
        for out in (finished, tmp_path)
    ]
    assert told[0] == told[1]


def test_a_published_checkpoint_goes_on_after_its_epoch(finished, data, tmp_path, capsys):
    """microsoft/unilm's utils.save_model: model, optimizer, epoch, scaler, args (a
    Namespace).
    """
    ours = checkpoint(finished / "checkpoint-step4.pth")
    optimizer = ours["optimizer"]
    for moments in optimizer["state"].values():
        moments["step"] = int(moments["step"])  # as torch wrote it then
    args = argparse.Namespace(
        **{name: ours["args"][name] for name in ("lr", "opt", "epochs", "batch_size")}, seed=3
    )
    theirs = {"model": ours["model"], "optimizer": optimizer, "epoch": 0, "scaler": {}, "args": args}
    torch.save(theirs, tmp_path / "checkpoint.pth")
    published = (tmp_path / "checkpoint.pth").read_bytes()
    run_class_finetuning.main(finetuning_flags(data, tmp_path))
    out = capsys.readouterr().out
    assert re.search(r"resumed .*checkpoint.pth: epoch 1, 0 samples into it, step 4", out)
    assert (tmp_path / "checkpoint-published.pth").read_bytes() == published
    # its moments too, or they would differ
    assert_same_weights(tmp_path / "checkpoint.pth", finished / "checkpoint.pth")
    assert [line["epoch"] for line in log_lines(tmp_path)] == [1]


@pytest.mark.parametrize("epoch", ["2", "99"])
def test_a_start_behind_the_end_is_refused(epoch, data, tmp_path, capsys):
    assert f"--start_epoch {epoch}" in refused(
        run_class_finetuning.main, finetuning_flags(data, tmp_path, "--start_epoch", epoch), capsys
    )
