"""Scripts in processes of their own, and a function on several gloo ranks of this
machine.
"""

import os
import signal
import socket
import subprocess
import sys
import tempfile

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from source_files import ROOT

from runtime import distributed

LAUNCHERS = {
    "torchrun": [sys.executable, "-m", "torch.distributed.run"],
    "torch.distributed.launch": [sys.executable, "-m", "torch.distributed.launch"],
}


def environment(**more: str) -> dict[str, str]:
    """That of a process of its own: one thread, no GPU."""
    return os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONUNBUFFERED": "1"} | more


def start(command: list[str], **more: str) -> subprocess.Popen[str]:
    """A command in the repository's folder, both outputs in one pipe; `more` goes into
    its environment.
    """
    return subprocess.Popen(
        command, cwd=ROOT, env=environment(**more), text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def end(process: subprocess.Popen[str], timeout: int = 240) -> tuple[int, str]:
    """(exit status, what it said)"""
    try:
        said, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return process.returncode, said


def run(command: list[str]) -> str:
    status, said = end(start(command), timeout=600)
    assert status == 0, said[-6000:]
    return said


def one_process(script: str, flags: list[str]) -> str:
    return run([sys.executable, script, *flags])


def two_processes(script: str, flags: list[str], launcher: str = "torchrun") -> str:
    where = ["--nproc_per_node=2", "--master_port", str(free_port())]
    return run([*LAUNCHERS[launcher], *where, script, *flags])


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _rank(rank, function, world_size, port, folder, args):
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=world_size)
    torch.save(function(rank, world_size, *args), os.path.join(folder, f"{rank}.pt"))
    distributed.stop()


def run_ranks(function, world_size, *args):
    """[function(rank, world_size, *args) for each rank], each in a process of its own;
    the results travel as files of torch.save.
    """
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_rank, (function, world_size, free_port(), folder, args), nprocs=world_size)
        return [torch.load(os.path.join(folder, f"{rank}.pt")) for rank in range(world_size)]
