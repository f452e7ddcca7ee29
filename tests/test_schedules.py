"""A constant learning rate that falls when one asks for it: a trunk and a branch from
it are the run that was planned so, bit for bit.
"""

import shutil

import numpy as np
import pytest
import torch
from refusals import refused, user_reads
from tiny_runs import (
    assert_same_weights,
    checkpoint,
    finetuning_flags,
    kill_after,
    log_lines,
    pretraining_flags,
    student,
    vqkd_flags,
)

import run_beitv2_pretraining
import run_class_finetuning
import run_vqkd_training
from schedules import ScheduleOptions, build_schedule, cosine_scheduler


def rates(epochs, schedule="wsd", lr=1.0, steps_per_epoch=10, **more):
    settings = {"min_lr": 0.1, "warmup_epochs": 1, "warmup_steps": -1, "weight_decay": 0.05}
    options = ScheduleOptions(epochs, **settings, weight_decay_end=None, schedule=schedule, **more)
    return build_schedule(options, lr, steps_per_epoch)


def test_the_rate_is_constant_and_then_falls_as_one_minus_a_root():
    lr = rates(6, cooldown_epochs=2).lr
    assert np.array_equal(lr[:10], np.linspace(0, 1, 10))
    assert (lr[10:41] == 1).all()
    assert lr[45] == pytest.approx(0.1 + 0.9 * (1 - 0.25**0.5))
    assert (np.diff(lr[40:]) < 0).all()
    assert 0.1 < lr[-1] < 0.125
    assert (rates(6).lr[9:] == 1).all()
    assert len(lr) == 60


def test_a_branch_has_the_rates_of_the_planned_run():
    assert np.array_equal(rates(6).cool_down(40).lr, rates(6, cooldown_epochs=2).lr)
    assert np.array_equal(rates(100).lr[:40], rates(6, cooldown_epochs=2).lr[:40])
    assert np.array_equal(rates(6, "cosine").lr, cosine_scheduler(1.0, 0.1, 6, 10, 1))


@pytest.mark.parametrize(("schedule", "start"), [("cosine", 40), ("wsd", 5)])
def test_a_cool_down_needs_a_constant_rate(schedule, start):
    with user_reads("where the learning rate is not constant: it needs --schedule wsd"):
        rates(6, schedule).cool_down(start)
    with user_reads("--epochs end at step 60, and the cool-down starts at step 60: give more"):
        rates(6).cool_down(60)


def stage(name, data, codes, out, *more):
    """(main, flags): a constant rate from the second step on, four steps per epoch."""
    more = ("--schedule", "wsd", "--warmup_steps", "2", *more)
    if name == "vqkd":
        more = ("--quantize_kmeans_init", "--revive_dead_codes", *more)
        return run_vqkd_training.main, vqkd_flags(data, out, *more)
    if name == "pretrain":
        return run_beitv2_pretraining.main, pretraining_flags(data, out, codes, "--drop_path", "0.1", *more)
    more = ("--mixup", "0.8", "--model_ema", "--model_ema_decay", "0.9", *more)
    return run_class_finetuning.main, finetuning_flags(data, out, *more)


def kill(main, flags, steps):
    with pytest.MonkeyPatch.context() as patch:
        kill_after(steps, patch)
        with pytest.raises(KeyboardInterrupt):
            main(flags)


def without_times(lines):
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vqkd", "pretrain", "finetune"])
def test_trunk_and_branch_are_the_planned_run_bit_for_bit(name, data, tokenizer_weight, tmp_path):
    main, planned = stage(
        name, data, tokenizer_weight, tmp_path / "planned", "--epochs", "3", "--cooldown_epochs", "2"
    )
    main(planned)
    main, trunk = stage(
        name, data, tokenizer_weight, tmp_path / "trunk", "--epochs", "9", "--save_ckpt_freq", "1"
    )
    kill(main, trunk, steps=8)
    branching = ["--cooldown_from", str(tmp_path / "trunk/checkpoint-0.pth"), "--epochs", "3"]
    main, branch = stage(name, data, tokenizer_weight, tmp_path / "branch", *branching)
    main(branch)
    assert_same_weights(tmp_path / "planned/checkpoint.pth", tmp_path / "branch/checkpoint.pth")
    logs = [log_lines(tmp_path / out) for out in ("planned", "branch")]
    assert without_times(logs[0][1:]) == without_times(logs[1])
    trunk_rates = [line["train_lr"] for line in log_lines(tmp_path / "trunk")]
    assert trunk_rates[0] == trunk_rates[-1] > logs[1][-1]["train_lr"]
    averages = [
        checkpoint(tmp_path / out / "checkpoint.pth").get("model_ema") for out in ("planned", "branch")
    ]
    if name == "finetune":
        assert all(torch.equal(value, averages[1][key]) for key, value in averages[0].items())


@pytest.fixture(scope="module")
def trunk(data, tokenizer_weight, tmp_path_factory):
    """Two epochs of pretraining, a checkpoint after each step."""
    out = tmp_path_factory.mktemp("trunk")
    more = ["--save_ckpt_steps", "1", "--keep_ckpts", "9"]
    main, flags = stage("pretrain", data, tokenizer_weight, out, *more)
    main(flags)
    return out


@pytest.mark.slow
def test_a_longer_trunk_goes_on_as_if_planned(trunk, data, tokenizer_weight, tmp_path):
    shutil.copytree(trunk, tmp_path / "longer")
    for out in ("longer", "once"):
        main, flags = stage("pretrain", data, tokenizer_weight, tmp_path / out, "--epochs", "3")
        main(flags)
    assert_same_weights(tmp_path / "longer/checkpoint.pth", tmp_path / "once/checkpoint.pth")


@pytest.mark.slow
def test_a_stopped_branch_goes_on_though_its_trunk_has_moved(trunk, data, tokenizer_weight, tmp_path):
    """From the middle of an epoch; the checkpoint that it came from is another one by
    now.
    """
    shutil.copy(trunk / "checkpoint-step3.pth", tmp_path / "trunk.pth")
    branching = ["--cooldown_from", str(tmp_path / "trunk.pth"), "--epochs", "3", "--save_ckpt_steps", "1"]
    main, whole = stage("pretrain", data, tokenizer_weight, tmp_path / "whole", *branching)
    main(whole)
    main, broken = stage("pretrain", data, tokenizer_weight, tmp_path / "broken", *branching)
    kill(main, broken, steps=3)
    shutil.copy(trunk / "checkpoint-step7.pth", tmp_path / "trunk.pth")
    main(broken)
    assert_same_weights(tmp_path / "whole/checkpoint.pth", tmp_path / "broken/checkpoint.pth")
    assert checkpoint(tmp_path / "broken/checkpoint.pth")["cooldown_start"] == 3


def test_cooldown_from_implies_the_schedule(trunk, data, tokenizer_weight, tmp_path, capsys):
    flags = ["--cooldown_from", str(trunk / "checkpoint.pth"), "--epochs", "3"]
    run_beitv2_pretraining.main(pretraining_flags(data, tmp_path, tokenizer_weight, *flags))
    assert "cool-down  of the learning rate: steps 8 to 12" in capsys.readouterr().out
    assert log_lines(tmp_path)[-1]["train_lr"] < log_lines(trunk)[-1]["train_lr"]


FLAGS = {
    "cooldown_epochs 1 needs a learning rate that is constant": [
        "--schedule",
        "cosine",
        "--cooldown_epochs",
        "1",
    ],
    "cooldown_from x.pth needs a learning rate": ["--cooldown_from", "x.pth", "--schedule", "cosine"],
    "contradict each other": ["--cooldown_from", "x.pth", "--cooldown_epochs", "1"],
    "is the whole run of --epochs 2": ["--cooldown_epochs", "2"],
    "both name the checkpoint to go on from": ["--cooldown_from", "x.pth", "--resume", "y.pth"],
    "weight_decay_end 0.1 is the end of a cosine": ["--weight_decay_end", "0.1"],
    "x.pth": ["--cooldown_from", "x.pth"],
}


@pytest.mark.parametrize("says", FLAGS)
def test_flags_that_do_not_go_together(says, data, tokenizer_weight, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    main, flags = stage("pretrain", data, tokenizer_weight, "", *FLAGS[says])
    assert says in refused(main, flags, capsys)


def test_a_branch_from_something_else_is_refused(trunk, data, tokenizer_weight, tmp_path, capsys):
    def says(source, *more, out=""):
        main, flags = stage("pretrain", data, tokenizer_weight, out, "--cooldown_from", str(source), *more)
        return refused(main, flags, capsys)

    longer = ["--epochs", "3"]
    assert "holds only weights" in says(student(tmp_path / "pt.pth"), *longer)
    assert "--epochs end at step 8, and the cool-down starts at step 8" in says(trunk / "checkpoint.pth")
    assert "holds a run that is not cooling down" in says(trunk / "checkpoint-step4.pth", *longer, out=trunk)
    content = checkpoint(trunk / "checkpoint.pth")
    for name, change in {
        "cosine": {"args": content["args"] | {"schedule": "cosine"}},
        "planned": {"args": content["args"] | {"cooldown_epochs": 1}},
        "branch": {"cooldown_start": 4},
    }.items():
        torch.save(content | change, tmp_path / f"{name}.pth")
    assert "learning rate was falling" in says(tmp_path / "cosine.pth", *longer)
    for name in ("planned", "branch"):
        assert "is cooling down already" in says(tmp_path / f"{name}.pth", *longer)
