"""Two runs in one folder: the second is refused, the place of a killed one is taken."""

import errno
import json
import os
import signal
import subprocess
import sys

import pytest
from refusals import user_reads
from tiny_runs import finetuning_flags, photos

import run_class_finetuning
from errors import UserError
from runtime import run_lock

HOLD = """
import os, pathlib, sys, time
from runtime import run_lock
run_lock.RunLock(pathlib.Path(sys.argv[1])).sign()
os.fork() or time.sleep(600)  # a child of its own, as data workers are
print("held", flush=True)
time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, start_new_session=True
    )
    assert process.stdout.readline() == b"held\n"
    yield process
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def record(path, **changes):
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | changes))


@pytest.mark.parametrize("locks", [True, False], ids=["with locks", "file system without locks"])
def test_a_second_run_is_refused_unless_the_first_was_killed(locks, holder, tmp_path, monkeypatch):
    if not locks:
        monkeypatch.setattr(
            run_lock.fcntl, "lockf", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSYS, "no locks"))
        )
    with user_reads(rf"in use by a run \(process {holder.pid} on \S+, since 20.* another --output_dir"):
        run_lock.RunLock(tmp_path)
    holder.kill()  # its child lives on
    holder.wait()
    lock = run_lock.RunLock(tmp_path)
    lock.sign()
    assert json.loads((tmp_path / run_lock.NAME).read_text())["pid"] == os.getpid()
    lock.release()
    assert not (tmp_path / run_lock.NAME).exists()


def test_another_process_of_the_same_number_is_no_holder(tmp_path, monkeypatch):
    monkeypatch.setattr(run_lock, "fcntl", None)
    run_lock.RunLock(tmp_path).sign()
    record(tmp_path / run_lock.NAME, pid=os.getppid(), process_started=run_lock.started(os.getppid()))
    with pytest.raises(UserError, match="in use"):
        run_lock.RunLock(tmp_path)
    record(tmp_path / run_lock.NAME, process_started="1")
    run_lock.RunLock(tmp_path).release()


def test_a_lock_of_another_machine_holds_and_says_what_to_do(tmp_path):
    path = tmp_path / run_lock.NAME
    run_lock.RunLock(tmp_path).sign()
    record(path, host="elsewhere", boot="another", pid=7)
    with pytest.raises(UserError, match=rf"process 7 on elsewhere, since .* remove {path}"):
        run_lock.RunLock(tmp_path)
    record(path, host=run_lock.socket.gethostname())  # this machine, before it was started anew
    run_lock.RunLock(tmp_path).release()
    path.write_text("half a rec")  # killed while it signed
    run_lock.RunLock(tmp_path).release()


def test_a_run_in_anothers_folder_is_refused_but_not_evaluation(holder, tmp_path, capsys):
    data = photos(tmp_path / "photos")
    (tmp_path / ".checkpoint.pth.1.part").write_bytes(b"what the other is writing")
    with pytest.raises(SystemExit) as stop:
        run_class_finetuning.main(finetuning_flags(data, tmp_path))
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert error.count("\n") == 1
    assert f"process {holder.pid} on" in error
    with pytest.raises(SystemExit):  # not for the lock
        run_class_finetuning.main([*finetuning_flags(data, tmp_path), "--eval", "--resume", "none.pth"])
    assert "in use" not in capsys.readouterr().err
    assert (tmp_path / ".checkpoint.pth.1.part").exists()


def test_the_lock_is_gone_when_a_run_has_ended(tmp_path):
    run_class_finetuning.main(
        finetuning_flags(photos(tmp_path / "photos"), tmp_path / "out", "--epochs", "1")
    )
    assert not (tmp_path / "out" / run_lock.NAME).exists()
