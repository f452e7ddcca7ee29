"""What docs/reliability.md promises, each fault caused for real."""

import argparse
import contextlib
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from many_processes import LAUNCHERS, end, free_port, run, start
from refusals import refused
from source_files import ROOT
from tiny_runs import (
    RunsCode,
    assert_same_weights,
    checkpoint,
    finetuning_flags,
    log_lines,
    photos,
    pretraining_flags,
    vqkd_flags,
)

import run_beitv2_pretraining
import run_class_finetuning
import run_vqkd_training
import visualize_attention
from checkpoint_io import checkpoints, resumption
from errors import UserError
from runtime.metrics import forget_epochs_from

SLOW = ["--print_freq", "1", "--epochs", "12"]  # about as long as a process takes to start


def start_pretraining(flags, launcher=()):
    return start([sys.executable, *launcher, "run_beitv2_pretraining.py", *flags])


def read_until(process, pattern):
    text = ""
    for line in process.stdout:
        text += line
        if re.search(pattern, line):
            return text
    raise AssertionError(f"'{pattern}' never came:\n{text}")


# ── killed, asked to stop ──


@pytest.mark.slow
def test_killed_runs_resume_bit_for_bit():
    """Two kills; scripts/kill_test.py makes a hundred, over all stages."""
    # folders, then shards
    command = [sys.executable, "scripts/kill_test.py", "--kills", "2", "--stages", "vqkd"]
    assert "2 of 2 kills were followed by the end of the undisturbed run" in run(command)


def test_the_name_to_go_on_from_is_given_last(tmp_path, monkeypatch):
    """Else a run killed in between would go on behind a best checkpoint that was never written."""
    given, replace = [], os.replace
    monkeypatch.setattr(os, "replace", lambda old, new: (replace(old, new), given.append(Path(new).name)))
    saver = checkpoints.Saver()
    saver.submit(
        {"model": {"w": torch.ones(2)}},
        tmp_path,
        ["checkpoint.pth", "checkpoint-4.pth", "checkpoint-best.pth"],
    )
    saver.wait()
    assert sorted(given) == ["checkpoint-4.pth", "checkpoint-best.pth", "checkpoint.pth"]
    assert given[-1] == "checkpoint.pth"


def test_a_run_killed_while_it_takes_up_log_txt_loses_no_line(tmp_path, monkeypatch):
    path = tmp_path / "log.txt"
    path.write_text('{"epoch": 0}\n{"epoch": 1}\n')

    def killed(self, *_, **__):
        open(self, "w").close()
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_text", killed)
        with pytest.raises(KeyboardInterrupt):
            forget_epochs_from(1, path)
    forget_epochs_from(1, path)
    assert path.read_text() == '{"epoch": 0}\n'


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_step_saves_and_exits_with_success(number, data, codes, tmp_path):
    whole = pretraining_flags(data, tmp_path / "whole", codes, *SLOW)
    flags = pretraining_flags(data, tmp_path / "out", codes, *SLOW, "--num_workers", "1")
    run_beitv2_pretraining.main(whole)
    process = start_pretraining(flags)
    read_until(process, r"epoch 2/12 \[2/4\]")
    process.send_signal(number)
    status, out = end(process)
    assert status == 0, out
    assert re.search(
        rf"stopped by {signal.Signals(number).name} after step \d+: the same command line " r"goes on", out
    )
    stopped = checkpoint(tmp_path / "out/checkpoint.pth")["next"]["step"]
    assert 6 <= stopped < 48
    run_beitv2_pretraining.main(flags)
    assert_same_weights(tmp_path / "whole/checkpoint.pth", tmp_path / "out/checkpoint.pth")
    assert [line["train_loss"] for line in log_lines(tmp_path / "whole")] == [
        line["train_loss"] for line in log_lines(tmp_path / "out")
    ]


def test_a_second_ctrl_c_ends_at_once(data, codes, tmp_path, monkeypatch):
    from runtime import signals

    monkeypatch.setattr(os, "kill", lambda pid, number: (_ for _ in ()).throw(KeyboardInterrupt))
    before = signal.getsignal(signal.SIGINT)
    with signals.StopSignal() as stop:
        stop.note(signal.SIGINT, None)
        assert stop.requested()
        with pytest.raises(KeyboardInterrupt):
            stop.note(signal.SIGINT, None)
    assert signal.getsignal(signal.SIGINT) is before


def ranks_of(launcher_pid):
    """Process ids of a launcher's children that run a script of ours, oldest first."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
                if (
                    parent == launcher_pid
                    and b"run_beitv2_pretraining.py" in (entry / "cmdline").read_bytes()
                ):
                    found.append(int(entry.name))
            except (OSError, IndexError):
                continue
    return sorted(found)


def two_ranks(*more):
    where = ["--rdzv_backend=c10d", f"--rdzv_endpoint=127.0.0.1:{free_port()}"]
    return ["-m", "torch.distributed.run", "--nproc_per_node=2", *where, *more]


@pytest.mark.slow
def test_a_signal_to_one_process_stops_both_after_one_step(data, codes, tmp_path):
    flags = pretraining_flags(data, tmp_path, codes, "--print_freq", "1", "--epochs", "40")
    process = start_pretraining(flags, two_ranks())
    read_until(process, r"epoch 2/40 \[1/2\]")
    os.kill(ranks_of(process.pid)[1], signal.SIGUSR1)
    status, out = end(process)
    assert status == 0, out
    assert "stopped by" in out
    assert checkpoint(tmp_path / "checkpoint.pth")["next"]["step"] < 80


@pytest.mark.slow
def test_torchrun_restarts_after_a_process_was_killed(data, codes, tmp_path):
    flags = pretraining_flags(
        data, tmp_path / "out", codes, "--print_freq", "1", "--epochs", "8", "--save_ckpt_steps", "1"
    )
    process = start_pretraining(flags, two_ranks("--max-restarts=1"))
    read_until(process, r"epoch 2/8 \[1/2\]")
    os.kill(ranks_of(process.pid)[1], signal.SIGKILL)
    status, out = end(process)
    assert status == 0, out
    assert "resumed" in out
    undisturbed = pretraining_flags(data, tmp_path / "whole", codes, "--epochs", "8")
    assert end(start_pretraining(undisturbed, two_ranks()))[0] == 0
    assert_same_weights(tmp_path / "whole/checkpoint.pth", tmp_path / "out/checkpoint.pth")


@pytest.mark.slow
def test_a_lost_process_takes_the_others_down_with_a_message(data, codes, tmp_path):
    flags = pretraining_flags(
        data, tmp_path, codes, "--print_freq", "1", "--epochs", "400", "--dist_timeout", "0.2"
    )
    process = start_pretraining(flags, two_ranks())
    read_until(process, r"epoch 2/400 \[1/2\]")
    os.kill(ranks_of(process.pid)[1], signal.SIGKILL)
    status, out = end(process)
    assert status != 0
    assert "another process of this run was lost" in out or "Signal 9" in out or "SIGKILL" in out


# ── files ──


@pytest.mark.parametrize("damage", ["truncated", "altered", "empty"])
def test_a_damaged_checkpoint_falls_back_to_the_newest_good_one(damage, data, codes, tmp_path, capsys):
    flags = pretraining_flags(data, tmp_path, codes, "--save_ckpt_steps", "3", "--keep_ckpts", "2")
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


def test_only_the_last_step_checkpoints_are_kept(data, codes, tmp_path):
    run_beitv2_pretraining.main(
        pretraining_flags(data, tmp_path, codes, "--save_ckpt_steps", "1", "--keep_ckpts", "2")
    )
    assert {path.name for path in tmp_path.glob("checkpoint-step*")} == {
        "checkpoint-step7.pth",
        "checkpoint-step8.pth",
    }


def test_what_a_killed_run_was_writing_is_removed(data, codes, tmp_path):
    (tmp_path / ".checkpoint.pth.123.part").write_bytes(b"half")
    run_beitv2_pretraining.main(pretraining_flags(data, tmp_path, codes, "--epochs", "1"))
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


def test_a_full_disk_keeps_the_checkpoint_and_names_the_space(data, codes, tmp_path, capsys):
    with small_disk(tmp_path / "small", "30m") as small:
        error = refused(
            run_beitv2_pretraining.main,
            pretraining_flags(data, small, codes, "--log_dir", str(tmp_path / "tb")),
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


# ── input that cannot be trusted ──


@pytest.mark.parametrize("format", ["torch", "pickle"])
def test_a_payload_is_refused_by_every_flag_that_takes_a_file(format, data, codes, tmp_path, capsys):
    trap, file = tmp_path / "trapped", tmp_path / "payload.pth"
    if format == "torch":
        torch.save({"model": RunsCode(trap)}, file)
    else:
        file.write_bytes(pickle.dumps({"model": RunsCode(trap)}))
    photo = str(next(data.rglob("*.jpg")))
    out = tmp_path / "out"
    cases = [
        (run_beitv2_pretraining, [*pretraining_flags(data, out, codes), "--resume", str(file)]),
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


def test_a_published_file_with_a_namespace_resumes_as_weights(data, codes, tmp_path, capsys):
    run_beitv2_pretraining.main(pretraining_flags(data, tmp_path / "first", codes, "--epochs", "1"))
    model = checkpoint(tmp_path / "first/checkpoint.pth")["model"]
    torch.save({"model": model, "args": argparse.Namespace(lr=1e-3), "epoch": 5}, tmp_path / "published.pth")
    flags = pretraining_flags(data, tmp_path / "second", codes, "--resume", str(tmp_path / "published.pth"))
    run_beitv2_pretraining.main(flags)
    assert "holds weights alone" in capsys.readouterr().out


# ── numbers that go wrong ──


def test_the_bad_batch_is_described(data, codes, tmp_path, monkeypatch):
    import json

    original = run_beitv2_pretraining.PretrainingStage.step

    def explode(self, model, batch):
        loss, logs = original(self, model, batch)
        return loss * float("nan"), logs

    monkeypatch.setattr(run_beitv2_pretraining.PretrainingStage, "step", explode)
    with pytest.raises(SystemExit):
        run_beitv2_pretraining.main(
            pretraining_flags(data, tmp_path, codes, "--epochs", "20", "--print_freq", "1")
        )
    described = json.loads((tmp_path / "bad_batch-rank0.json").read_text())
    assert described["step"] == 9
    batch = described["last_micro_batches"][0]
    assert len(batch["indices"]) == 4
    assert batch["image"]["finite"] is True


def test_anomaly_detection_names_the_operation(data, codes, tmp_path, monkeypatch):
    original = run_beitv2_pretraining.PretrainingStage.step

    def explode(self, model, batch):
        loss, logs = original(self, model, batch)
        return loss + (model.mask_token * 0).sum().sqrt(), logs  # the square root's slope at 0 is infinite

    monkeypatch.setattr(run_beitv2_pretraining.PretrainingStage, "step", explode)
    with pytest.raises(RuntimeError, match="returned nan values"):
        run_beitv2_pretraining.main(pretraining_flags(data, tmp_path, codes, "--detect_anomaly"))
    torch.autograd.set_detect_anomaly(False)


# ── several machines ──


@pytest.fixture
def two_hosts():
    """Two network namespaces joined by a cable: hosts of their own as far as sockets can tell."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces need root and iproute2")
    names = [f"beit{os.getpid()}a", f"beit{os.getpid()}b"]
    setup = [
        *(f"ip netns add {name}" for name in names),
        f"ip link add veth0 netns {names[0]} type veth peer name veth0 netns {names[1]}",
        *(f"ip -n {name} addr add 10.77.0.{host}/24 dev veth0" for host, name in enumerate(names, start=1)),
        *(f"ip -n {name} link set {device} up" for name in names for device in ("veth0", "lo")),
    ]
    try:
        for command in setup:
            if subprocess.run(command.split(), capture_output=True).returncode:
                pytest.skip(f"network namespaces are not allowed here ({command})")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


@pytest.mark.slow
def test_two_hosts_follow_the_curve_of_one_with_two_processes(two_hosts, data, codes, tmp_path):
    flags = pretraining_flags(data, tmp_path / "hosts", codes)
    processes = []
    for node, host in enumerate(two_hosts):
        where = ["--nnodes=2", f"--node_rank={node}", "--nproc_per_node=1"]
        where += ["--master_addr=10.77.0.1", "--master_port=29511"]
        command = [*LAUNCHERS["torch.distributed.launch"], *where, "run_beitv2_pretraining.py", *flags]
        processes.append(start(["ip", "netns", "exec", host, *command], GLOO_SOCKET_IFNAME="veth0"))
    for process in processes:
        status, out = end(process)
        assert status == 0, out
    alone = pretraining_flags(data, tmp_path / "one", codes)
    assert end(start_pretraining(alone, two_ranks()))[0] == 0
    for mine, other in zip(log_lines(tmp_path / "hosts"), log_lines(tmp_path / "one"), strict=True):
        assert mine["train_loss"] == pytest.approx(other["train_loss"], rel=1e-5)
    assert_same_weights(tmp_path / "hosts/checkpoint.pth", tmp_path / "one/checkpoint.pth")


# ── before the first step, and where nobody can write ──


def ranks_with(flags, *more):
    """Two processes of pretraining, started by hand, each with its own further flags."""
    port, processes = str(free_port()), []
    for rank, own in enumerate(more):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
        command = [sys.executable, "run_beitv2_pretraining.py", *flags, *own]
        processes.append(start(command, MASTER_ADDR="127.0.0.1", MASTER_PORT=port, **place))
    return [end(process) for process in processes]  # in 4 minutes: --dist_timeout is 30


@pytest.mark.slow
@pytest.mark.parametrize("difference", ["flags", "images", "a failure on rank 1", "a failure on rank 0"])
def test_processes_that_differ_end_at_once_and_say_why(difference, data, codes, tmp_path):
    flags = pretraining_flags(data, tmp_path / "out", codes)
    fewer = photos(tmp_path / "fewer", per_class=5)
    nowhere = ["--data_path", str(tmp_path / "nowhere")]
    more, says = {
        "flags": ([[], ["--lr", "7e-4"]], "different flags: --lr 0.001 on rank 0, 0.0007 on rank 1"),
        "images": ([[], ["--data_path", str(fewer)]], "different images: 16 on rank 0, 10 on rank 1"),
        "a failure on rank 1": ([[], nowhere], "nowhere: no such folder"),
        "a failure on rank 0": ([nowhere, []], "nowhere: no such folder"),
    }[difference]
    for status, out in ranks_with(flags, *more):
        assert status == 2, out
        assert says in out
        assert "Traceback" not in out


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_a_signal_before_the_first_step_ends_with_success(name, data, codes, tmp_path):
    process = start_pretraining(pretraining_flags(data, tmp_path, codes))
    read_until(process, "^device ")
    process.send_signal(getattr(signal, name))
    status, out = end(process)
    assert status == 0, out
    assert f"stopped by {name}" in out
    assert "Traceback" not in out
    assert not (tmp_path / "run.lock").exists()


def test_a_closed_terminal_saves_and_ends_with_success(data, codes, tmp_path):
    """The terminal goes away while the run prints to it, and SIGHUP comes."""
    import pty

    ours, theirs = pty.openpty()
    flags = pretraining_flags(
        data, tmp_path, codes, "--print_freq", "1", "--epochs", "400", "--num_workers", "1"
    )
    process = subprocess.Popen(
        [sys.executable, "run_beitv2_pretraining.py", *flags], cwd=ROOT, stdin=theirs, stdout=theirs, stderr=theirs,
        env=os.environ | {"OMP_NUM_THREADS": "1"}, start_new_session=True,
    )  # fmt: skip
    os.close(theirs)
    text = b""
    while b"epoch 2/400" not in text:
        text += os.read(ours, 1000)
    os.close(ours)
    process.send_signal(signal.SIGHUP)
    assert process.wait(timeout=120) == 0
    assert 4 <= checkpoint(tmp_path / "checkpoint.pth")["next"]["step"] < 1600


def test_what_nohup_ignores_stays_ignored():
    from runtime import signals

    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with signals.StopSignal():
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def one_sentence(capsys, flags):
    return refused(run_beitv2_pretraining.main, flags, capsys)


def test_a_folder_removed_while_running_is_told_in_a_sentence(data, codes, tmp_path, monkeypatch, capsys):
    import engine

    out, take_step = tmp_path / "out", engine.take_step

    def remove(state, clip_grad):
        if state.step == 5:
            while out.exists():  # a save that is under way may add to it meanwhile
                shutil.rmtree(out, ignore_errors=True)
        return take_step(state, clip_grad)

    monkeypatch.setattr(engine, "take_step", remove)
    error = one_sentence(capsys, pretraining_flags(data, out, codes, "--save_ckpt_steps", "1"))
    assert str(out) in error
    monkeypatch.setattr(engine, "take_step", lambda s, c: remove(s, c))
    error = one_sentence(capsys, pretraining_flags(data, out, codes))  # log.txt comes before the checkpoint
    assert str(out) in error


def test_a_folder_that_cannot_be_written_is_told_in_a_sentence(data, codes, tmp_path, capsys):
    (tmp_path / "file").write_text("a file where a folder should be")
    for out in (tmp_path / "file/out", Path("/proc/self/out")):
        assert f"--output_dir {out}: cannot be written to" in one_sentence(
            capsys, pretraining_flags(data, out, codes)
        )


def test_a_disk_that_is_full_on_resume_keeps_checkpoint_and_log(data, codes, tmp_path, capsys):
    with small_disk(tmp_path / "small", "60m") as small:
        run_beitv2_pretraining.main(pretraining_flags(data, small, codes, "--epochs", "1"))
        before = [(small / name).read_bytes() for name in ("checkpoint.pth", "log.txt")]
        (small / ".checkpoint.pth.7.part").write_bytes(b"")
        # to the last block
        subprocess.run(["dd", "if=/dev/zero", f"of={small}/filler", "bs=4096"], capture_output=True)
        error = one_sentence(capsys, pretraining_flags(data, small, codes))
        assert "No space left" in error
        assert [(small / name).read_bytes() for name in ("checkpoint.pth", "log.txt")] == before
