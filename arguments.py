"""What command-line flags are made of: the parser, the types of their values, and what
a parsed command line can be asked. The flags themselves are declared in flags/, a
module per stage. Published names and defaults are kept (docs/deviations.md lists the
exceptions); flags that lost their meaning are accepted and say so.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, TypeVar

import config_files
from errors import ArgumentParser

# Accepted so that old command lines run; a warning says what replaces them.
OBSOLETE = {
    "warmup_lr": "the warm-up starts at 0; its length is --warmup_epochs or --warmup_steps",
    "decoupling_aug": "both views always share one crop and flip",
    "resplit": "random erasing never splits the augmentations here",
    "enable_deepspeed": "mixed precision (--amp_dtype) and DDP take its place",
    "load_tar": "tar files are read with --data_set webdataset (scripts/make_shards.py writes them)",
    "world_size": "the launcher (torchrun, torch.distributed.launch, srun) says how many processes there are",
    "local_rank": "",  # torch.distributed.launch passes it on its own: nothing to say
    "dist_eval": "evaluation is always shared by all processes, and every image counts once",
}
# What flags for weights take. Everywhere downloads.fetch reads it; of teachers and
# pixel decoders nothing was published.
FILE_OR_URL = "path or URL (in quotes)"
WEIGHTS = "path, URL (in quotes), published name or id of Hugging Face's hub"


T = TypeVar("T", bound=Any)  # a dataclass


class Flags(argparse.Namespace):
    """Parsed flags; read-only once `freeze` was called, so that what is logged is what
    ran.
    """

    def freeze(self) -> Flags:
        self.__dict__["_frozen"] = True
        return self

    def __setattr__(self, name: str, value: Any) -> None:
        if self.__dict__.get("_frozen"):
            raise AttributeError(f"flags are read-only: derive a local value instead of setting {name}")
        super().__setattr__(name, value)

    def replace(self, **changes: Any) -> Flags:
        """A copy with some values changed, read-only too."""
        return Flags(**{**vars(self), **changes, "_frozen": False}).freeze()

    def plain(self) -> dict[str, Any]:
        """For checkpoints and logs."""
        return {key: value for key, value in sorted(vars(self).items()) if not key.startswith("_")}

    @property
    def given(self) -> frozenset[str]:
        """The flags that the command line or its --config names, also those that it
        gives their default.
        """
        return vars(self).get("_given", frozenset())

    @property
    def words(self) -> tuple[str, ...]:
        """The command line, with --config as it was typed."""
        return vars(self).get("_words", ())

    def to_config(self, given_only: bool = False) -> dict[str, Any]:
        """What --config reads back to the same flags. `given_only`: of a run whose
        other flags come from its checkpoint.
        """
        named = self.given if given_only else vars(self)
        return {
            key: "x".join(map(str, value)) if isinstance(value, tuple) else value  # height x width
            for key, value in self.plain().items()
            if key in named and key not in OBSOLETE
        }


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Names a flag's default, where it has one and the text does not name it."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        says_enough = action.nargs == 0 or action.default in (None, "") or "default" in (action.help or "")
        return action.help if says_enough else super()._get_help_string(action)


def new_parser(description: str, example: str) -> argparse.ArgumentParser:
    """`example`: the flags of a command line that a newcomer can copy, on two lines at
    most.
    """
    parser = ArgumentParser(
        usage="python %(prog)s " + example.replace("\n", " \\\n           "),
        description=description,
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config",
        metavar="FILE",
        type=expand_home,
        default=argparse.SUPPRESS,  # config_files.expand puts the file's flags in its place
        help="JSON or YAML file of flags, such as a run's flags.json; the command line wins",
    )
    return parser


def words_of(argv: Sequence[str] | None) -> list[str]:
    """A blank after a line's closing backslash reaches a script as an argument of its
    own, which is never meant.
    """
    return [word for word in (sys.argv[1:] if argv is None else argv) if not word or word.strip()]


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None = None) -> Flags:
    typed = words_of(argv)
    words = config_files.expand(parser, typed)
    args = parser.parse_args(words, namespace=Flags())
    if getattr(args, "cooldown_from", ""):  # acts with one schedule only
        parser.set_defaults(schedule="wsd")
        args = parser.parse_args(words, namespace=Flags())
    args._words = tuple(typed)
    args._given = frozenset(config_files.named_flags(parser, words))
    betas, opt = getattr(args, "opt_betas", None), getattr(args, "opt", "").lower()
    if betas and len(betas) != 2 and not (len(betas) == 3 and ("adan" in opt or "ademamix" in opt)):
        parser.error(f"--opt_betas takes two numbers for {args.opt}, such as 0.9 0.999")
    return args.freeze()


def changed_flags(parser: argparse.ArgumentParser, args: argparse.Namespace) -> dict[str, Any]:
    """The flags that differ from their defaults."""
    return {
        k: v for k, v in sorted(vars(args).items()) if not k.startswith("_") and v != parser.get_default(k)
    }


def warn_of_obsolete_flags(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    for name in changed_flags(parser, args):
        if OBSOLETE.get(name):
            logging.getLogger("beit").warning(f"warning: --{name} does nothing: {OBSOLETE[name]}")


def format_flag(parser: argparse.ArgumentParser, name: str, value: Any) -> str:
    """How a command line asks for this value of a flag: --input_size 224, --use_cls, no
    --abs_pos_emb.
    """
    if isinstance(value, (list, tuple)):
        texts = (str(number).removesuffix(".0") for number in value)
        return f"--{name} {('x' if name == 'input_size' else ' ').join(texts)}"
    if not isinstance(value, bool):
        return f"no --{name}" if value is None else f"--{name} {value}"
    options = [
        action.option_strings[0]
        for action in parser._actions
        if action.dest == name and action.const is value
    ]
    return options[0] if options else f"no --{name}"


def warn_of_idle_flags(
    parser: argparse.ArgumentParser, args: argparse.Namespace, idle: dict[str, str]
) -> None:
    """`idle`: name of a flag -> why it does nothing beside the other flags. One warning
    a reason, of what was set.
    """
    by_reason: dict[str, list[str]] = {}
    for name in changed_flags(parser, args):
        if name in idle:
            by_reason.setdefault(idle[name], []).append(f"--{name}")
    for reason, names in by_reason.items():
        verb = "do" if len(names) > 1 else "does"
        logging.getLogger("beit").warning(f"warning: {', '.join(names)} {verb} nothing here: {reason}")


def true_or_false(text: str) -> bool:
    if text.lower() in ("true", "1", "yes", "on"):
        return True
    if text.lower() in ("false", "0", "no", "off"):
        return False
    raise argparse.ArgumentTypeError(f"{shorten(text)} is neither True nor False")


@dataclass(frozen=True)
class Number:
    """The type of a numeric flag: a finite number from `low` to `high`; `above`,
    `below`: without that end itself.
    """

    kind: type[int] | type[float]
    low: float
    high: float
    above: bool = False
    below: bool = False

    def __call__(self, text: str) -> Any:
        with contextlib.suppress(ValueError):
            value = self.kind(text)
            if (self.low < value if self.above else self.low <= value) and (
                value < self.high if self.below else value <= self.high
            ):
                return value
        raise argparse.ArgumentTypeError(f"{shorten(text)} is not {self}")

    def __str__(self) -> str:
        low, high = (f"{end:,}" if isinstance(end, int) else f"{end:g}" for end in (self.low, self.high))
        ends = f"{'above' if self.above else 'from'} {low} {'and below' if self.below else 'to'} {high}"
        return f"a {'whole ' if self.kind is int else ''}number {ends}"


def shorten(text: str) -> str:
    """What a user typed, in quotes and on one line, for a message."""
    return repr(text if len(text) <= 40 else f"{text[:37]}...")


# What is above these is a slip of the keyboard, or a number that no memory holds.
MOST = 10**9
LARGEST = 1e9
positive, not_negative = Number(int, 1, MOST), Number(int, 0, MOST)
small_count = Number(int, 1, 1000)  # layers, heads, repetitions
large_count = Number(int, 1, 2**20)  # codes, channels, images of a batch
seed = Number(int, 0, 2**32 - 1)  # what NumPy's generator takes
above_zero, not_negative_number = Number(float, 0, LARGEST, above=True), Number(float, 0, LARGEST)
probability = Number(float, 0, 1)
below_one = Number(float, 0, 1, below=True)
fraction = Number(float, 0, 1, above=True)
crop_share = Number(float, 0.05, 1)  # the image is enlarged to the input's size over this
scale = Number(float, 0.01, 100)
pixels = Number(int, 1, 2**14)  # side of an image


def image_size(text: str) -> int | tuple[int, int]:
    """`224`: a square's side; `384x512`: height x width."""
    sides = [pixels(part) for part in text.lower().split("x", 2)]
    if len(sides) > 2:
        raise argparse.ArgumentTypeError(
            f"{shorten(text)} is neither a side in pixels nor height x width, such as 384x512"
        )
    return sides[0] if len(set(sides)) == 1 else (sides[0], sides[1])


def expand_home(text: str) -> str:
    """The type of a flag for a path (or several, joined by ::): the shell leaves ~ as
    it is after a `=`.
    """
    parts = [os.path.expanduser(part) for part in text.split("::")]
    if "\0" in text:
        raise argparse.ArgumentTypeError(f"{shorten(text)} holds a NUL character, which no path can")
    for part in parts:
        if part.startswith("~") and not os.path.lexists(part):
            raise argparse.ArgumentTypeError(
                f"{shorten(part)}: there is no such user; write ./{shorten(part)[1:-1]} for a name"
            )
    return "::".join(parts)


def add_switch(group: Any, name: str, off: str, default: bool, help: str) -> None:
    """A pair of flags for one value: --name turns it on, --off turns it off."""
    on_help, off_help = (f"{help} (the default)", f"turns --{name} off") if default else (help, "the default")
    group.add_argument(f"--{name}", action="store_true", default=default, help=on_help)
    group.add_argument(f"--{off}", action="store_false", dest=name, default=default, help=off_help)


def add_obsolete(group: Any, *names: str, **settings: Any) -> None:
    """One of OBSOLETE: accepted, not shown by --help."""
    group.add_argument(*names, help=argparse.SUPPRESS, **settings)


def options(kind: type[T], args: argparse.Namespace) -> T:
    """The flags that bear the names of a dataclass's fields, as such an object; what is
    no flag of this command keeps the field's default.
    """
    return kind(**{field.name: vars(args)[field.name] for field in fields(kind) if field.name in vars(args)})
