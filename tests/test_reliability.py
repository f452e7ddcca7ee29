"""What docs/reliability.md promises of files, folders and numbers, each fault caused
for real.
"""

import argparse
import contextlib
import os
import pickle
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from refusals import refused
from tiny_runs import RunsCode, checkpoint, finetuning_flags, pretraining_flags, spoil_loss, vqkd_flags

import run_beitv2_pretraining
import run_class_finetuning
import run_vqkd_training
import visualize_attention
from checkpoint_io import checkpoints, resumption
from errors import UserError


@pytest.mark.parametrize("damage", ["truncated", "altered", "empty"])
def test_a_damaged_checkpoint_falls_back_to_the_newest_good_one(
    damage, data, tokenizer_weight, tmp_path, capsys
):
    flags = pretraining_flags(data, tmp_path, tokenizer_weight, "--save_ckpt_steps", "3", "--keep_ckpts", "2")
    run_beitv2_pretraining.main(flags)
    good = checkpoint(tmp_path / "checkpoint.pth")
    for name in ("checkpoint.pth", "checkpoint-1.pth"):  # one file under two names
        path = tmp_path / name
        content = path.read_bytes()
        path.unlink()
        half = len(content) // 2
        altered = content[:half] + bytes([content[half] ^ 255]) + content[half + 1 :]
        path.write_bytes({"truncated": content[:half], "altered": altered, "empty": b""}[damage])
    capsys.readouterr()
    run_beitv2_pretraining.main(flags)
    out = capsys.readouterr().out
    assert re.search(r"checkpoint.pth is damaged .* going on from .*checkpoint-step6.pth", out)
    again = checkpoint(tmp_path / "checkpoint.pth")
    assert all(torch.equal(good["model"][key], again["model"][key]) for key in good["model"])


def test_only_the_last_step_checkpoints_are_kept(data, tokenizer_weight, tmp_path):
    run_beitv2_pretraining.main(
        pretraining_flags(data, tmp_path, tokenizer_weight, "--save_ckpt_steps", "1", "--keep_ckpts", "2")
    )
    assert {path.name for path in tmp_path.glob("checkpoint-step*")} == {
        "checkpoint-step7.pth",
        "checkpoint-step8.pth",
    }


def test_what_a_killed_run_was_writing_is_removed(data, tokenizer_weight, tmp_path):
    (tmp_path / ".checkpoint.pth.123.part").write_bytes(b"half")
    run_beitv2_pretraining.main(pretraining_flags(data, tmp_path, tokenizer_weight, "--epochs", "1"))
    assert not list(tmp_path.glob(".*.part"))


@contextlib.contextmanager
def small_disk(folder, size):
    folder.mkdir()
    if (
        os.geteuid() != 0
        or subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]).returncode
    ):
        pytest.skip("cannot mount a small tmpfs here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_keeps_the_checkpoint_and_names_the_space(data, tokenizer_weight, tmp_path, capsys):
    with small_disk(tmp_path / "small", "30m") as small:
        error = refused(
            run_beitv2_pretraining.main,
            pretraining_flags(data, small, tokenizer_weight, "--log_dir", str(tmp_path / "tb")),
            capsys,
        )
        assert re.search(r"MiB needed, [\d.]+ MiB free; the previous checkpoint is intact", error)
        assert resumption.is_intact(small / "checkpoint.pth")
        assert checkpoint(small / "checkpoint.pth")["epoch"] == 0
        assert not list(small.glob(".*.part"))


def test_an_error_in_the_background_stops_the_run(tmp_path):
    saver = checkpoints.Saver()
    saver.submit({"model": torch.zeros(3)}, tmp_path, ["checkpoint.pth"])
    saver.wait()
    (tmp_path / "file").write_text("a file where a folder should be")
    saver.submit({"model": torch.zeros(3)}, tmp_path / "file", ["checkpoint.pth"])
    with pytest.raises((UserError, OSError)):
        saver.wait()
    saver.wait()  # raised once


def test_what_is_saved_is_what_was_at_the_time_of_saving(tmp_path):
    saver, tensor = checkpoints.Saver(), torch.zeros(2_000_000)
    saver.submit({"model": {"w": tensor}}, tmp_path, ["checkpoint.pth"])
    tensor.fill_(1)
    saver.wait()
    assert float(checkpoint(tmp_path / "checkpoint.pth")["model"]["w"].sum()) == 0


@pytest.mark.parametrize("format", ["torch", "pickle"])
def test_a_payload_is_refused_by_every_flag_that_takes_a_file(
    format, data, tokenizer_weight, tmp_path, capsys
):
    trap, file = tmp_path / "trapped", tmp_path / "payload.pth"
    if format == "torch":
        torch.save({"model": RunsCode(trap)}, file)
    else:
        file.write_bytes(pickle.dumps({"model": RunsCode(trap)}))
    photo = str(next(data.rglob("*.jpg")))
    out = tmp_path / "out"
    cases = [
        (run_beitv2_pretraining, [*pretraining_flags(data, out, tokenizer_weight), "--resume", str(file)]),
        (run_beitv2_pretraining, pretraining_flags(data, out, file)),
        (run_vqkd_training, [*vqkd_flags(data, out), "--resume", str(file)]),
        (
            run_vqkd_training,
            [*vqkd_flags(data, out), "--eval", "--eval_data_path", str(data), "--resume", str(file)],
        ),
        (
            run_vqkd_training,
            [*vqkd_flags(data, out), "--teacher_model_type", "timm:resnet18", "--teacher_weight", str(file)],
        ),
        (run_class_finetuning, [*finetuning_flags(data, out), "--resume", str(file)]),
        (run_class_finetuning, [*finetuning_flags(data, out), "--finetune", str(file)]),
        (run_class_finetuning, [*finetuning_flags(data, out), "--eval", "--resume", str(file)]),
        (
            visualize_attention,
            ["--checkpoint", str(file), "--image", photo, "--output", str(tmp_path / "a.png")],
        ),
    ]
    for module, flags in cases:
        with pytest.raises(SystemExit) as stop:
            module.main(flags)
        error = capsys.readouterr().err
        assert stop.value.code == 2
        assert str(file) in error
        assert "Traceback" not in error
        assert not trap.exists(), f"{module.__name__} ran the payload"


def test_a_published_file_with_a_namespace_resumes_as_weights(data, tokenizer_weight, tmp_path, capsys):
    run_beitv2_pretraining.main(
        pretraining_flags(data, tmp_path / "first", tokenizer_weight, "--epochs", "1")
    )
    model = checkpoint(tmp_path / "first/checkpoint.pth")["model"]
    torch.save({"model": model, "args": argparse.Namespace(lr=1e-3), "epoch": 5}, tmp_path / "published.pth")
    flags = pretraining_flags(
        data, tmp_path / "second", tokenizer_weight, "--resume", str(tmp_path / "published.pth")
    )
    run_beitv2_pretraining.main(flags)
    assert "holds only weights" in capsys.readouterr().out


def test_the_bad_batch_is_described(data, tokenizer_weight, tmp_path, monkeypatch):
    import json

    spoil_loss(monkeypatch, run_beitv2_pretraining.PretrainingStage)
    with pytest.raises(SystemExit):
        run_beitv2_pretraining.main(
            pretraining_flags(data, tmp_path, tokenizer_weight, "--epochs", "20", "--print_freq", "1")
        )
    described = json.loads((tmp_path / "bad_batch-rank0.json").read_text())
    assert described["step"] == 9
    batch = described["last_micro_batches"][0]
    assert len(batch["indices"]) == 4
    assert batch["image"]["finite"] is True


def test_anomaly_detection_names_the_operation(data, tokenizer_weight, tmp_path, monkeypatch):
    original = run_beitv2_pretraining.PretrainingStage.step

    def explode(self, model, batch):
        loss, logs = original(self, model, batch)
        return loss + (model.mask_token * 0).sum().sqrt(), logs  # the square root's slope at 0 is infinite

    monkeypatch.setattr(run_beitv2_pretraining.PretrainingStage, "step", explode)
    with pytest.raises(RuntimeError, match="returned nan values"):
        run_beitv2_pretraining.main(pretraining_flags(data, tmp_path, tokenizer_weight, "--detect_anomaly"))
    torch.autograd.set_detect_anomaly(False)


def one_sentence(capsys, flags):
    return refused(run_beitv2_pretraining.main, flags, capsys)


def test_a_folder_removed_while_running_is_told_in_a_sentence(
    data, tokenizer_weight, tmp_path, monkeypatch, capsys
):
    import engine

    out, take_step = tmp_path / "out", engine.take_step

    def remove(state, clip_grad):
        if state.step == 5:
            while out.exists():  # a save that is under way may add to it meanwhile
                shutil.rmtree(out, ignore_errors=True)
        return take_step(state, clip_grad)

    monkeypatch.setattr(engine, "take_step", remove)
    error = one_sentence(capsys, pretraining_flags(data, out, tokenizer_weight, "--save_ckpt_steps", "1"))
    assert str(out) in error
    monkeypatch.setattr(engine, "take_step", lambda s, c: remove(s, c))
    error = one_sentence(
        capsys, pretraining_flags(data, out, tokenizer_weight)
    )  # log.txt comes before the checkpoint
    assert str(out) in error


def test_a_folder_that_cannot_be_written_is_told_in_a_sentence(data, tokenizer_weight, tmp_path, capsys):
    (tmp_path / "file").write_text("a file where a folder should be")
    for out in (tmp_path / "file/out", Path("/proc/self/out")):
        assert f"--output_dir {out}: cannot be written to" in one_sentence(
            capsys, pretraining_flags(data, out, tokenizer_weight)
        )


def test_a_disk_that_is_full_on_resume_keeps_checkpoint_and_log(data, tokenizer_weight, tmp_path, capsys):
    with small_disk(tmp_path / "small", "60m") as small:
        run_beitv2_pretraining.main(pretraining_flags(data, small, tokenizer_weight, "--epochs", "1"))
        before = [(small / name).read_bytes() for name in ("checkpoint.pth", "log.txt")]
        (small / ".checkpoint.pth.7.part").write_bytes(b"")
        # to the last block
        subprocess.run(["dd", "if=/dev/zero", f"of={small}/filler", "bs=4096"], capture_output=True)
        error = one_sentence(capsys, pretraining_flags(data, small, tokenizer_weight))
        assert "No space left" in error
        assert [(small / name).read_bytes() for name in ("checkpoint.pth", "log.txt")] == before
