"""Runs that are killed or asked to stop, by one process or several:
docs/reliability.md, each fault caused for real.
"""

import datetime
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from many_processes import end, free_port, run, start
from source_files import ROOT
from tiny_runs import assert_same_weights, checkpoint, log_lines, pretraining_flags

import engine
import run_beitv2_pretraining
from checkpoint_io import checkpoints
from monitoring.run_files import JsonLines

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


@pytest.mark.slow
def test_killed_runs_resume_bit_for_bit():
    """Two kills; scripts/kill_test.py makes a hundred, over all stages."""
    # folders, then shards
    command = [sys.executable, "scripts/kill_test.py", "--kills", "2", "--stages", "vqkd"]
    assert "2 of 2 kills were followed by the end of the undisturbed run" in run(command)


def test_the_name_to_go_on_from_is_given_last(tmp_path, monkeypatch):
    """Else a run killed in between would go on behind a best checkpoint that was never
    written.
    """
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
            JsonLines(path).go_on_before("epoch", 1)
    JsonLines(path).go_on_before("epoch", 1)
    assert path.read_text() == '{"epoch": 0}\n'


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_step_saves_and_exits_with_success(number, data, tokenizer_weight, tmp_path):
    whole = pretraining_flags(data, tmp_path / "whole", tokenizer_weight, *SLOW)
    flags = pretraining_flags(data, tmp_path / "out", tokenizer_weight, *SLOW, "--num_workers", "1")
    run_beitv2_pretraining.main(whole)
    process = start_pretraining(flags)
    read_until(process, r"epoch 2/12 \[2/4\]")
    process.send_signal(number)
    status, out = end(process)
    assert status == 0, out
    assert re.search(
        rf"stopped by {signal.Signals(number).name} after step \d+: rerun the same command to resume", out
    )
    stopped = checkpoint(tmp_path / "out/checkpoint.pth")["next"]["step"]
    assert 6 <= stopped < 48
    run_beitv2_pretraining.main(flags)
    assert_same_weights(tmp_path / "whole/checkpoint.pth", tmp_path / "out/checkpoint.pth")
    assert [line["train_loss"] for line in log_lines(tmp_path / "whole")] == [
        line["train_loss"] for line in log_lines(tmp_path / "out")
    ]


def test_a_second_ctrl_c_ends_at_once(data, tokenizer_weight, tmp_path, monkeypatch):
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
def test_a_signal_to_one_process_stops_both_after_one_step(data, tokenizer_weight, tmp_path):
    flags = pretraining_flags(data, tmp_path, tokenizer_weight, "--print_freq", "1", "--epochs", "40")
    process = start_pretraining(flags, two_ranks())
    read_until(process, r"epoch 2/40 \[1/2\]")
    os.kill(ranks_of(process.pid)[1], signal.SIGUSR1)
    status, out = end(process)
    assert status == 0, out
    assert "stopped by" in out
    assert checkpoint(tmp_path / "checkpoint.pth")["next"]["step"] < 80


@pytest.mark.slow
def test_torchrun_restarts_after_a_process_was_killed(data, tokenizer_weight, tmp_path):
    flags = pretraining_flags(
        data,
        tmp_path / "out",
        tokenizer_weight,
        "--print_freq",
        "1",
        "--epochs",
        "8",
        "--save_ckpt_steps",
        "1",
    )
    process = start_pretraining(flags, two_ranks("--max-restarts=1"))
    read_until(process, r"epoch 2/8 \[1/2\]")
    os.kill(ranks_of(process.pid)[1], signal.SIGKILL)
    status, out = end(process)
    assert status == 0, out
    assert "resumed" in out
    undisturbed = pretraining_flags(data, tmp_path / "whole", tokenizer_weight, "--epochs", "8")
    assert end(start_pretraining(undisturbed, two_ranks()))[0] == 0
    assert_same_weights(tmp_path / "whole/checkpoint.pth", tmp_path / "out/checkpoint.pth")


@pytest.mark.slow
def test_a_lost_process_takes_the_others_down_with_a_message(data, tokenizer_weight, tmp_path):
    flags = pretraining_flags(
        data, tmp_path, tokenizer_weight, "--print_freq", "1", "--epochs", "400", "--dist_timeout", "0.2"
    )
    process = start_pretraining(flags, two_ranks())
    read_until(process, r"epoch 2/400 \[1/2\]")
    os.kill(ranks_of(process.pid)[1], signal.SIGKILL)
    status, out = end(process)
    assert status != 0
    assert "another process of this run was lost" in out or "Signal 9" in out or "SIGKILL" in out


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_a_signal_before_the_first_step_ends_with_success(name, data, tokenizer_weight, tmp_path):
    process = start_pretraining(pretraining_flags(data, tmp_path, tokenizer_weight))
    read_until(process, "^device ")
    process.send_signal(getattr(signal, name))
    status, out = end(process)
    assert status == 0, out
    assert f"stopped by {name}" in out
    assert "Traceback" not in out
    assert not (tmp_path / "run.lock").exists()


@pytest.mark.slow
def test_a_closed_terminal_saves_and_ends_with_success(data, tokenizer_weight, tmp_path):
    """The terminal goes away while the run prints to it, and SIGHUP comes."""
    import pty

    ours, theirs = pty.openpty()
    flags = pretraining_flags(
        data, tmp_path, tokenizer_weight, "--print_freq", "1", "--epochs", "400", "--num_workers", "1"
    )
    process = subprocess.Popen(
        [sys.executable, "run_beitv2_pretraining.py", *flags],
        cwd=ROOT,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )
    os.close(theirs)
    text = b""
    while b"epoch 2/400" not in text:
        text += os.read(ours, 1000)
    os.close(ours)
    process.send_signal(signal.SIGHUP)
    assert process.wait(timeout=120) == 0
    assert 4 <= checkpoint(tmp_path / "checkpoint.pth")["next"]["step"] < 1600


def test_the_group_of_signals_waits_as_long_as_dist_timeout_says(
    data, tokenizer_weight, tmp_path, monkeypatch
):
    from runtime import signals

    made = []
    monkeypatch.setattr(signals.distributed, "world_size", lambda: 2)
    monkeypatch.setattr(signals.dist, "new_group", lambda **how: made.append(how))
    signals.StopSignal(timeout_minutes=2.5)
    assert made == [{"backend": "gloo", "timeout": datetime.timedelta(seconds=150)}]
    monkeypatch.undo()
    given = []
    monkeypatch.setattr(
        engine, "StopSignal", lambda minutes: given.append(minutes) or signals.StopSignal(minutes)
    )
    more = ["--epochs", "1", "--batch_size", "16", "--dist_timeout", "7", "--warmup_epochs", "0"]
    run_beitv2_pretraining.main(pretraining_flags(data, tmp_path, tokenizer_weight, *more))
    assert given == [7]


def test_what_nohup_ignores_stays_ignored():
    from runtime import signals

    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with signals.StopSignal():
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
