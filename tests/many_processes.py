"""Run a function on several gloo ranks of this machine and bring their results back."""

import os
import socket

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from runtime import distributed


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
    """[function(rank, world_size, *args) for each rank], each in a process of its own, results saved as tensors."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_rank, (function, world_size, free_port(), folder, args), nprocs=world_size)
        return [torch.load(os.path.join(folder, f"{rank}.pt")) for rank in range(world_size)]
