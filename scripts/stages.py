"""What the demos share: an entry script run as a user would run it, the log that it
writes, which stage of how many it is, and whether it went well.
"""

from __future__ import annotations

import json
import math
import shlex
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from errors import UserError, printable
from runtime.terminal import format_duration

ROOT = Path(__file__).resolve().parent.parent
# of the demo's models at 128 pixels, on two idle cores of an AMD EPYC: seconds for an
# image in training, all else included, and for a stage to begin
SECONDS_AN_IMAGE = {"vqkd": 0.0037, "pretrain": 0.0033, "finetune": 0.0027, "segment": 0.02}
SECONDS_TO_BEGIN = 4.0


def expect(kind: str, images: float) -> float:
    """Seconds of a stage that trains on so many images, counted each time they come."""
    return SECONDS_TO_BEGIN + SECONDS_AN_IMAGE[kind] * images


class Stages:
    """The stages of a demo in their order.

    expected: name -> its title, and `expect` of it. seconds: of those that are done.
    """

    def __init__(self, expected: dict[str, tuple[str, float]]) -> None:
        self.expected, self.seconds = expected, dict[str, float]()

    def headline(self, name: str) -> list[str]:
        """Which stage it is, and the time left for it and those after it: as long as
        expected, on a machine that is as fast as it was so far.
        """
        number = list(self.expected).index(name) + 1
        left = sum(seconds for other, (_, seconds) in self.expected.items() if other not in self.seconds)
        known = sum(self.expected[other][1] for other in self.seconds)
        left *= sum(self.seconds.values()) / known if known else 1.0
        about = "about " + format_duration(60 * math.ceil(left / 60) if left > 90 else left)
        ahead = "left" if known else "in all on two idle cores; stage 1 will tell how fast this machine is"
        title = f"── stage {number} of {len(self.expected)}: {self.expected[name][0]} ──"
        return [title, f"time       {about} {ahead}"]

    def run(self, name: str, stage: Callable[[], float]) -> None:
        """`stage` returns its seconds."""
        print("\n\n" + "\n".join(self.headline(name)), flush=True)
        self.seconds[name] = stage()


def run_entry(stage: str, script: str, flags: str, *more: str) -> float:
    """One entry script in a process of its own; its seconds. The demo stops if it
    fails.
    """
    command = [sys.executable, str(ROOT / script), *shlex.split(flags), *more]
    print("\n".join(map(printable, format_command([script, *command[2:]]))) + "\n", flush=True)
    started = time.monotonic()
    process = subprocess.Popen(command, cwd=ROOT)
    try:
        status = process.wait()
    except KeyboardInterrupt:  # which the stage has received too: it ends by itself
        process.wait()
        raise UserError(
            f"stopped in stage {stage} by Ctrl-C; the demo begins anew when it is run again"
        ) from None
    if status != 0:
        raise UserError(f"stage {stage} failed (status {status}); its output is above")
    return time.monotonic() - started


def format_command(words: list[str], width: int = 88) -> list[str]:
    """As typed in a shell in this folder, flag by flag."""
    flags: list[list[str]] = [[]]
    for word in words:
        flags += [[]] if word.startswith("--") else []
        flags[-1].append(shlex.quote(word.removeprefix(f"{ROOT}/")))
    lines = ["$ python"]
    for flag in flags:
        text = " ".join(flag)
        if len(lines[-1]) + len(text) > width - 3:
            lines[-1] += " \\"
            lines.append("     ")
        lines[-1] += f" {text}"
    return lines


def log_of(folder: Path) -> list[dict[str, Any]]:
    """The lines of log.txt of a run that wrote to `folder`."""
    return [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]


# ── Whether a stage went well ──


def judge_tokenizer(lines: list[dict[str, Any]], codes: int) -> str:
    """Of its log and the size of its codebook."""
    first, last = lines[0]["train_loss"], lines[-1]["train_loss"]
    used, even = lines[-1]["train_codes_used"], lines[-1].get("train_perplexity", 0.0)
    found = f"the loss went from {first:.3f} to {last:.3f}; {used} of {codes} codes are used"
    if not last < first:
        return f"went badly: {found}. The loss should fall"
    if used < codes / 2 or even < codes / 4:
        return (
            f"went badly: {found}, most patches by about {even:.0f} of them (perplexity). Most codes should "
            "be in use; docs/tokenizer.md says what helps"
        )
    return f"went well: {found}, with a perplexity of {even:.0f} ({codes}: all equally often)"


def judge_pretraining(lines: list[dict[str, Any]]) -> str:
    """Of its log."""
    first, last = 100 * lines[0]["train_mlm_acc_1"], 100 * lines[-1]["train_mlm_acc_1"]
    guess = 100 * lines[-1]["train_majority_code_share"]
    found = (
        f"of the masked patches, {first:.1f}% were guessed right in the first epoch and {last:.1f}% in the "
        f"last; always guessing the commonest code gives {guess:.1f}%"
    )
    if last > 2 * guess and last > first:
        return f"went well: {found}"
    return f"learned little: {found}. More epochs or more images may help"


def judge_segmentation(lines: list[dict[str, Any]], largest: float, classes: int) -> str:
    """Of its log; `largest`: percent of the pixels that are of the commonest class."""
    miou, right = lines[-1]["test_miou"], lines[-1]["test_aacc"]
    found = (
        f"{right:.1f}% of the validation pixels are right, the mIoU is {miou:.1f}; the commonest class alone "
        f"gives {largest:.1f}% and {largest / classes:.1f}"
    )
    return f"{'went well' if right > largest and miou > largest / classes else 'learned little'}: {found}"


def report(judgment: str) -> None:
    print("\n" + textwrap.fill(f"=> {judgment}.", 100, subsequent_indent="   "), flush=True)


def judge_accuracy(percent: float, guess: float, images: int) -> str:
    """Of a classifier on so many validation images; `guess`: percent of the most
    frequent class.
    """
    found = f"{percent:.1f}% of the validation images are right; the commonest class alone gives {guess:.1f}%"
    uncertain = math.sqrt(max(guess * (100 - guess), 1) / images)  # one standard deviation
    if percent > guess + 2 * uncertain:
        return f"went well: {found}"
    more = f"that is {percent - guess:+.1f} points, and {2 * uncertain:.1f} can be chance"
    return f"learned little: {found}; {more}"
