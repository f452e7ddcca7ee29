"""The one exception that carries a sentence to the user, raised on every floor.

A mistake of the user (a flag, a file, a folder) ends a run with one clear sentence that names the flag or file and the
way out. A mistake of ours keeps its traceback.
"""

from __future__ import annotations

import difflib
import functools
import sys
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

T = TypeVar("T")


class UserError(Exception):
    """Something the user can put right; the message is one sentence or two and needs no traceback."""


def pick(table: Mapping[str, T], name: str, what: str) -> T:
    """`table[name]`, or a UserError that calls the thing by its kind (`what`) and offers the nearest names."""
    if name in table:
        return table[name]
    near = difflib.get_close_matches(name, table, n=3, cutoff=0.5) or sorted(table)[:8]
    raise UserError(f"unknown {what} '{name}'; did you mean {' or '.join(near)}?")


def sentence(error: UserError) -> str:
    """What it says. When it was raised in a worker of a DataLoader, torch has put the worker's traceback before it."""
    text = str(error)
    in_worker = text.startswith(f"Caught {UserError.__name__} in ") and "\nOriginal Traceback" in text
    return text.rpartition(f"\n{UserError.__module__}.{UserError.__qualname__}: ")[2].strip() if in_worker else text


on_failure: list[Callable[[str], None]] = []  # told what a failing `main` says, before it ends: the other processes


def tells_the_user(main: Callable[..., Any]) -> Callable[..., Any]:
    """Decorator of every script's `main`: a UserError becomes one line on stderr and exit status 2."""

    @functools.wraps(main)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        try:
            return main(*args, **kwargs)
        except UserError as error:
            print(f"error: {sentence(error)}", file=sys.stderr, flush=True)
            for tell in list(on_failure):
                tell(sentence(error))
            raise SystemExit(2) from None
        except Exception as error:
            for tell in list(on_failure):
                tell(f"{type(error).__name__}: {error}")
            raise

    return wrapped
