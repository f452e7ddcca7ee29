"""What a run prints: the log of rank 0, the errors of every rank; which code it is."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

log = logging.getLogger("beit")  # information on rank 0 only, errors on every rank: see start()


class TerminalHandler(logging.Handler):
    """Lines on stdout that leave a progress bar on stderr whole."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            tqdm.write(self.format(record), file=sys.stdout)
            sys.stdout.flush()
        except OSError:  # the terminal is gone, or who read the pipe
            discard_output()


def discard_output() -> None:
    """What is printed from here on goes nowhere: a closed terminal does not end a run."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def set_up_logging(rank: int) -> None:
    log.setLevel(logging.INFO if rank == 0 else logging.ERROR)
    handler = TerminalHandler()
    handler.setFormatter(logging.Formatter("%(message)s" if rank == 0 else f"[rank {rank}] %(message)s"))
    log.handlers = [handler]
    log.propagate = False


@functools.cache
def log_once(text: str) -> None:
    """For what concerns images that may be looked for several times."""
    log.info(text)


@contextlib.contextmanager
def silence(level: int = logging.INFO) -> Iterator[None]:
    """Inside the block nothing is logged up to this level."""
    previous = logging.root.manager.disable
    logging.disable(level)
    try:
        yield
    finally:
        logging.disable(previous)


def format_size(n_bytes: float) -> str:
    return f"{n_bytes / 2**20:.0f} MiB" if n_bytes < 2**30 else f"{n_bytes / 2**30:.1f} GiB"


def format_clock(seconds: float) -> str:
    """`1d 2:03:04`"""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    return (f"{days}d " if days else "") + f"{hours}:{minutes:02d}:{seconds:02d}"


def git_commit() -> str:
    """Of the code that runs, `-dirty` where it was changed since."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"
