"""--config FILE: flags from a JSON or YAML file, as if they stood on the command line,
which wins where both name a flag.
"""

from __future__ import annotations

import argparse
import copy
import difflib
import json
import os
from collections.abc import Sequence
from typing import Any, NoReturn

import yaml

from errors import ArgumentParser, UserError

LARGEST = 2**20  # characters; a file of flags has some hundred


def expand(parser: argparse.ArgumentParser, words: Sequence[str]) -> list[str]:
    """`words` with the flags of the files in place of --config FILE, of several files
    the last one's. UserError: a file that cannot be read, or names no flag of `parser`,
    or a value that the flag does not take.
    """
    finder = ArgumentParser(prog=parser.prog, add_help=False, allow_abbrev=False)
    finder.add_argument("--config", action="append", default=[])
    found, rest = finder.parse_known_args(list(words))
    if not found.config or {"-h", "--help"} & set(rest):
        return list(words)
    given = named_flags(parser, rest)
    chosen: dict[str, list[str]] = {}
    for path in found.config:
        chosen |= read_flags(parser, os.path.expanduser(path))
    more = [word for dest, flag in chosen.items() if dest not in excluded_by(parser, given) for word in flag]
    at = rest.index("--") if "--" in rest else len(rest)
    return [*rest[:at], *more, *rest[at:]]


def named_flags(parser: argparse.ArgumentParser, words: Sequence[str]) -> set[str]:
    """The flags that `words` name, also those that they give their default."""
    names = vars(_without_defaults(parser).parse_args(list(words)))
    return {name for name in names if not name.startswith("_")}


def _without_defaults(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    silent = copy.deepcopy(parser)
    silent._defaults.clear()  # of set_defaults
    for action in silent._actions:
        action.default, action.required = argparse.SUPPRESS, False
    return silent


def excluded_by(parser: argparse.ArgumentParser, given: set[str]) -> set[str]:
    """`given`, and the flags that cannot stand beside one of these."""
    groups = [{action.dest for action in group._group_actions} for group in parser._mutually_exclusive_groups]
    return given.union(*(group for group in groups if group & given))


def read_flags(parser: argparse.ArgumentParser, path: str) -> dict[str, list[str]]:
    """Flag -> its words on a command line, each value checked as there."""
    silent = _without_defaults(parser)

    def refuse(message: str) -> NoReturn:
        raise UserError(f"--config {path}: {message}")

    silent.error = refuse  # type: ignore[method-assign]
    flags: dict[str, list[str]] = {}
    for name, value in read_mapping(path).items():
        try:
            dest, words = to_words(parser, name, value)
        except ValueError as error:
            refuse(str(error))
        if dest in flags:
            refuse(f"{name} is a flag that another line gives already")
        silent.parse_args(words)
        flags[dest] = words
    return flags


def read_mapping(path: str) -> dict[str, Any]:
    """A JSON object (.json) or a YAML mapping; {} for an empty YAML file. UserError:
    anything else.
    """
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read(LARGEST + 1)
        if len(text) > LARGEST:
            raise ValueError("it is too large for a file of flags")
        is_json = path.lower().endswith(".json")
        content = json.loads(text, object_pairs_hook=_unique) if is_json else yaml.load(text, _Loader)
    except OSError as error:
        raise UserError(f"--config {path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split()) or "nested too deeply"
        raise UserError(f"--config {path}: neither JSON (.json) nor YAML ({reason})") from None
    if content is None and not is_json:
        return {}
    if not isinstance(content, dict):
        raise UserError(f"--config {path}: a line 'flag: value' for each flag is expected, or a JSON object")
    return {str(name): value for name, value in content.items()}


def _unique(pairs: Sequence[tuple[Any, Any]]) -> dict[Any, Any]:
    names = [name for name, _ in pairs]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"{name} is given twice")
    return dict(pairs)


class _Loader(yaml.SafeLoader):
    """Refuses a name that is given twice, of which the last value would count."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        _unique([(key.value, None) for key, _ in node.value])
        return super().construct_mapping(node, deep)


def to_words(parser: argparse.ArgumentParser, name: str, value: Any) -> tuple[str, list[str]]:
    """(flag, its words on a command line); no words for null, which leaves the default.
    ValueError: no such flag, or not a value of its kind.
    """
    name = name.removeprefix("--")
    option = f"--{name}"
    actions = [a for a in parser._actions if a.option_strings and a.dest not in ("help", "config")]
    found = [a for a in actions if option in a.option_strings] or [a for a in actions if a.dest == name]
    if not found:
        names = [text.removeprefix("--") for action in actions for text in action.option_strings]
        near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
        hint = f"; did you mean {' or '.join(near)}?" if near else "; --help lists the flags"
        raise ValueError(f"{name} is no flag of {parser.prog}{hint}")
    action = found[0]
    if action.nargs == 0:
        return action.dest, _switch_to_words(name, action, actions, value)
    option = option if option in action.option_strings else action.option_strings[0]
    if value is None or (value == [] and not action.default):
        return action.dest, []
    if action.nargs is None:
        return action.dest, [f"{option}={_to_word(name, action, value)}"]
    values = value if isinstance(value, list) else [value]
    return action.dest, [option, *(_to_word(name, action, item) for item in values)]


def _switch_to_words(
    name: str, action: argparse.Action, actions: Sequence[argparse.Action], value: Any
) -> list[str]:
    if name == action.dest:  # one value, which several options set: mode: knn; rel_pos_bias: false
        switches = [other for other in actions if other.dest == name and other.nargs == 0]
        words = {str(other.const).lower(): [other.option_strings[0]] for other in switches}
        words |= {} if "true" not in words or "false" in words else {"false": []}
    else:
        words = {"true": [f"--{name}"], "false": []}  # no_auto_resume: true
    if value is None:
        return []
    if str(value).lower() not in words:
        raise ValueError(f"{name} is a switch: it takes {' or '.join(sorted(words))}, not {value!r}")
    return words[str(value).lower()]


def _to_word(name: str, action: argparse.Action, value: Any) -> str:
    if isinstance(value, bool):
        choices = [str(choice) for choice in action.choices or ()]
        if "on" in choices:  # what YAML makes of on and off
            return "on" if value else "off"
        if not isinstance(action.default, bool):
            raise ValueError(f"{name} takes a value, not {str(value).lower()}")
    elif not isinstance(value, (int, float, str)):
        kind = "a list" if isinstance(value, list) else type(value).__name__
        raise ValueError(f"{name} takes {'a value' if action.nargs is None else 'values'}, not {kind}")
    return str(value)
