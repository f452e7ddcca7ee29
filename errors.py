"""The one exception that carries a sentence to the user, raised in every layer, and
what may be in a text for the user.

A mistake of the user (a flag, a file, a folder) ends a run with one clear sentence that
names the flag or file and the way out. A mistake of ours keeps its traceback. Names of
files, classes and weights, and what servers say, were written by others: no control
character of theirs reaches the terminal or the log, and no password or signature of a
URL.
"""

from __future__ import annotations

import argparse
import difflib
import errno
import functools
import io
import logging
import re
import sys
import traceback
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, NoReturn, TypeVar

T = TypeVar("T")

# A URL from its "://" on: user and password (also one whose "/", "?" or "#" are not
# written as %XX); host and path; the rest.
URL = re.compile(
    r"://(?:[^/?#\s]*@|[^/?#\s:\[]*:(?!\d*(?:[/?#\s]|$))\S{0,256}@)?((?:(?!://)[^\s?#])*)([?#]\S*)?"
)
PARAMETER = re.compile(r"`([a-z]\w*)`")
PUNCTUATION = ":;,.()[]{}'\""  # that may follow a URL in a sentence
LONGEST_WORD, LONGEST_LINE = 400, 4000  # characters of a message
LONG_WORD, LONG_LINE = re.compile(rf"\S{{{LONGEST_WORD},}}"), re.compile(rf"(?s).{{{LONGEST_LINE},}}")


def hide_secrets(text: str) -> str:
    """`text` with no more of its URLs than scheme, host, port and path: the rest may be
    a password or a signature.
    """

    def shorten(url: re.Match[str]) -> str:
        rest = url[2] or ""  # with the punctuation of the sentence that the URL stands in
        return f"://{url[1]}{rest[len(rest.rstrip(PUNCTUATION)) :]}"

    return URL.sub(shorten, text) if "://" in text else text


def _cut_middle(kept: int, match: re.Match[str]) -> str:
    return f"{match[0][:kept]}...({len(match[0]) - 2 * kept} characters)...{match[0][-kept:]}"


def printable(text: str) -> str:
    """`text` as one line for the terminal, a log or a page: without secrets, control,
    direction and zero-width characters and halves of surrogate pairs escaped as in
    Python, and what is longer than anybody reads left out of the middle.
    """
    text = hide_secrets(text)
    for longest, long in ((LONGEST_WORD, LONG_WORD), (LONGEST_LINE, LONG_LINE)):
        kept = longest // 2 - 20
        text = long.sub(functools.partial(_cut_middle, kept), text)
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def _make_printable(record: logging.LogRecord) -> bool:
    record.msg, record.args = printable(name_flags(record.getMessage())), ()
    return True


# whatever handlers there are, in the processes that read data too
logging.getLogger("beit").addFilter(_make_printable)


class ArgumentParser(argparse.ArgumentParser):
    """Its errors are one line, and repeat what was typed."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {printable(message)} (--help lists the flags)\n")


class UserError(Exception):
    """Something the user can put right; the message is one sentence or two, without
    secrets, and needs no traceback.
    """

    def __init__(self, message: object = "") -> None:
        super().__init__(hide_secrets(str(message)))


class ParameterError(UserError, ValueError):
    """A value that a parameter does not take; the parameter is named in backticks."""


def name_flags(text: str) -> str:
    """Library code names its parameters, `batch_size`; a user of a command line
    reads the flag, --batch_size, which has the same name.
    """
    return PARAMETER.sub(r"--\1", text)


def count(number: int, noun: str) -> str:
    """ "1 step", "4 steps"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def pick(table: Mapping[str, T], name: str, what: str) -> T:
    """`table[name]`, or a UserError that calls the thing by its kind (`what`) and
    offers the nearest names.
    """
    if name in table:
        return table[name]
    near = difflib.get_close_matches(name, table, n=3, cutoff=0.5) or sorted(table)[:8]
    raise UserError(f"unknown {what} '{name}'; did you mean {' or '.join(near)}?")


def extract_message(error: UserError) -> str:
    """What it says. When it was raised in a worker of a DataLoader, torch has put the
    worker's traceback before it.
    """
    text = str(error)
    in_worker = text.startswith(f"Caught {UserError.__name__} in ") and "\nOriginal Traceback" in text
    return (
        text.rpartition(f"\n{UserError.__module__}.{UserError.__qualname__}: ")[2].strip()
        if in_worker
        else text
    )


# told what a failing `main` says, before it ends: the other processes
on_failure: list[Callable[[str], None]] = []


def notify_other_processes(message: str) -> None:
    for tell in list(on_failure):
        tell(message)


def report_user_errors(main: Callable[..., Any]) -> Callable[..., Any]:
    """Decorator of every script's `main`: a UserError becomes one line on stderr and
    exit status 2, and the traceback of any other error shows no secrets and no control
    characters.
    """

    @functools.wraps(main)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        sys.excepthook = _print_traceback
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")  # terminals that are not of UTF-8
        try:
            return main(*args, **kwargs)
        except Exception as error:
            if isinstance(error, UserError):
                message = name_flags(extract_message(error))
            elif isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
                message = f"{error.filename}: the name is too long for this file system"
            else:
                notify_other_processes(f"{type(error).__name__}: {error}")
                raise
        print(f"error: {printable(message)}", file=sys.stderr, flush=True)
        notify_other_processes(message)
        raise SystemExit(2)

    return wrapped


def _print_traceback(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    text = "".join(traceback.format_exception(kind, error, trace))
    sys.stderr.write("".join(f"{printable(line)}\n" for line in text.split("\n")[:-1]))
