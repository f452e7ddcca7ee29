"""What a run prints: the log of rank 0, the errors of every rank; which code it is."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from tqdm import tqdm

log = logging.getLogger("beit")  # information on rank 0 only, errors on every rank: see start()


WIDEST = 119  # columns of what is laid out to fit
SLOW = 3.0  # seconds without a line after which a user wants to know what is being done


class StatusLine:
    """The last line of a terminal, which rewrites itself; the log appears above it.
    Where neither stdout nor stderr is a terminal there is none.
    """

    def __init__(self) -> None:
        self.text, self.owner = "", os.getpid()
        self.is_guest = False  # another process's line may stand there

    @property
    def terminal(self) -> TextIO | None:
        """None from one moment to the next, when it is closed."""
        return next((stream for stream in (sys.stdout, sys.stderr) if is_terminal(stream)), None)

    @property
    def width(self) -> int:
        """Columns of a line, without the last one: some terminals wrap behind it."""
        terminal = self.terminal
        try:
            columns = os.get_terminal_size(terminal.fileno()).columns if terminal else WIDEST + 1
        except (OSError, ValueError):
            columns = 0
        return min(columns - 1 if columns > 1 else 79, WIDEST)

    @property
    def room(self) -> int:
        """Columns of the text: behind it a terminal writes the ^C that is typed."""
        return self.width - 2

    def show(self, text: str) -> None:
        """In place of the text before."""
        text = text[: self.room]
        self.write("\r" + text.ljust(len(self.text)))
        self.text = text

    def clear(self) -> str:
        """Returns what stood there."""
        shown, self.text = self.text, ""
        if os.getpid() != self.owner:  # a data process, forked while a text stood there
            return ""
        if shown or self.is_guest:
            self.write("\r" + " " * self.width + "\r")
        return shown

    def leave(self) -> None:
        """For a process that ends at once: what is printed next begins a line. Also in
        a handler of signals, in which a stream must not be written to.
        """
        terminal = self.terminal
        if self.text and terminal is not None:
            with contextlib.suppress(OSError):
                os.write(terminal.fileno(), b"\n")

    def write(self, text: str) -> None:
        terminal = self.terminal
        try:
            if terminal is not None:
                terminal.write(text)
                terminal.flush()
        except OSError:
            discard_output()


def is_terminal(stream: TextIO | None) -> bool:
    try:
        return stream is not None and stream.isatty()
    except ValueError:  # closed
        return False


status = StatusLine()


class TerminalHandler(logging.Handler):
    """Lines on stdout that leave the status line and a download's bar whole. At a
    terminal long ones are wrapped, behind the label that they begin with.
    """

    def emit(self, record: logging.LogRecord) -> None:
        text = self.format(record)
        if is_terminal(sys.stdout):
            text = wrap(text, status.width)
        shown = status.clear()
        try:
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()
        except OSError:  # the terminal is gone, or who read the pipe
            discard_output()
        if shown:
            status.show(shown)


def wrap(text: str, width: int) -> str:
    """`label      text ...` in lines of `width`, those after the first below the text."""
    lines = textwrap.wrap(
        text, width, subsequent_indent=" " * 11, break_long_words=False, break_on_hyphens=False
    )
    return "\n".join(lines) if len(text) > width else text


@contextlib.contextmanager
def say_if_slow(text: str) -> Iterator[None]:
    """Log `text` if the block takes longer than a few seconds. No process may be forked
    inside the block: a thread looks at the time.
    """
    timer = threading.Timer(SLOW, log.info, (text,))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()


def discard_output() -> None:
    """What is printed from here on goes nowhere: a closed terminal does not end a run."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def set_up_logging(rank: int) -> None:
    status.is_guest = rank != 0
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


def format_duration(seconds: float) -> str:
    """`41 s`, `2 min 10 s`, `3 h 20 min`, `2 d 4 h`"""
    if seconds < 9.95:
        return f"{seconds:.2g} s"
    found: list[str] = []
    left = round(seconds)
    for size, name in ((86400, "d"), (3600, "h"), (60, "min"), (1, "s")):
        if found or left >= size:
            found.append(f"{left // size} {name}")
        left %= size
    return " ".join(part for part in found[:2] if not part.startswith("0 "))


def format_end(seconds: float) -> str:
    """The time of day in so many seconds: `14:05`, `Tue 14:05`, `24 Dec 14:05`"""
    now, end = time.localtime(), time.localtime(time.time() + seconds)
    day = "" if now[:3] == end[:3] else "%a " if seconds < 6 * 86400 else "%d %b "
    return time.strftime(f"{day}%H:%M", end)


def format_figure(value: float) -> str:
    """Four significant digits: `0.5000`, `81.25`, `12,345`, `1.000e-05`; whole numbers
    as they are.
    """
    size = abs(value)
    if isinstance(value, int) or size == 0:
        return f"{value:,.0f}"
    if not 1e-4 <= size < 1e7:  # nan and inf too
        return f"{value:.3e}" if size < float("inf") else f"{value}"
    return f"{value:,.0f}" if size >= 999.95 else f"{value:#.4g}"


def git_commit() -> str:
    """Of the code that runs, `-dirty` where it was changed since."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"
