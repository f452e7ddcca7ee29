"""The flags of this run beside those that a finished model was trained with."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from checkpoint_io.checkpoints import to_plain_data
from runtime.terminal import log


@dataclass(frozen=True)
class RunFlags:
    """The flags of this run by name, and how a command line asks for the value of
    one.
    """

    values: Mapping[str, Any]
    format_flag: Callable[[str, Any], str]


def take_training_flags(
    theirs: Mapping[str, Any], names: Sequence[str], ours: RunFlags, given: Collection[str]
) -> dict[str, Any]:
    """The flags `names` of a model's training, `theirs`, which a finished model keeps,
    but those in `given`, which the user has set; says which of them differ from `ours`.
    """
    taken = {name: theirs[name] for name in names if name in theirs and name not in given}
    changed = [as_trained for as_trained, _ in compare_flags(taken, ours, list(taken))]
    if changed:
        log.info(f"as trained {', '.join(changed)}")
    return taken


def compare_flags(theirs: Mapping[str, Any], ours: RunFlags, names: Sequence[str]) -> list[tuple[str, str]]:
    """(as it was trained, as it is now) for each of `names` whose value in training was
    another one.
    """
    return [
        (ours.format_flag(name, theirs[name]), ours.format_flag(name, ours.values[name]))
        for name in names
        if name in theirs and to_plain_data(theirs[name]) != to_plain_data(ours.values[name])
    ]
