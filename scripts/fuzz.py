"""Hostile and damaged input for the entry scripts: flags, weight files, images, lists
and shards.

    python scripts/fuzz.py [--cases 1000] [--seed 0] [--kinds flags weights images
        lists] [--only N --keep FOLDER]

Each case runs one entry script in a process of its own on tiny data and must end within
the time limit with status 0 or 2, without a traceback, without starting a program or
running code of a file, without raw control characters in its output, and without using
what is damaged in silence. Prints a count for each kind and every case that failed. The
cases follow from the seed alone: `--only 17 --keep folder` runs case 17 again and keeps
its files.
"""

from __future__ import annotations

import argparse
import importlib
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # forked processes cannot share a pool of threads
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts"), str(ROOT / "tests")]

import torch  # noqa: E402

import arguments  # noqa: E402
from fuzzing import runs  # noqa: E402
from fuzzing.flags import flag_case  # noqa: E402
from fuzzing.images import image_case  # noqa: E402
from fuzzing.lists import list_case  # noqa: E402
from fuzzing.runs import Case  # noqa: E402
from fuzzing.weights import weight_case  # noqa: E402

CASES = {"flags": flag_case, "weights": weight_case, "images": image_case, "lists": list_case}

TIME_LIMIT = 90.0  # seconds
MEMORY_LIMIT = 4 << 30  # bytes of resident memory; a run on this data needs less than one GiB
ALLOWED_PROGRAMS = ("git", "/bin/sh", "ldconfig")  # asked for the commit; by ctypes and torch for libraries
COUNTED = ("cases", "refused", "ran", "with faults")
OUTPUT = "output.txt"
CONTROL = re.compile(
    rb"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]|\xc2[\x80-\x9f]|\xe2\x80[\xaa-\xae]|\xe2\x81[\xa6-\xa9]"
)


@dataclass(frozen=True)
class Outcome:
    status: int | None  # None: it did not end in time
    output: bytes
    seconds: float
    memory: int  # bytes, at most


def prepare() -> None:
    """Import everything once: the cases are forked from this process."""
    torch.set_num_threads(1)
    for entry in runs.ENTRIES:
        importlib.import_module(entry)
    importlib.import_module("webdataset.shardlists")


@dataclass(frozen=True)
class Running:
    """A case in a process of its own, whose output goes to a file."""

    number: int
    case: Case
    folder: Path
    process: int
    started: float


def start_case(number: int, case: Case, folder: Path) -> Running:
    process = os.fork()
    if process == 0:
        _run_entry(case, folder)
    return Running(number, case, folder, process, time.monotonic())


def outcome_of(running: Running) -> Outcome | None:
    """None while it runs; beyond the limits of time and memory it is killed."""
    ended, status, usage = os.wait4(running.process, os.WNOHANG)
    seconds, memory = time.monotonic() - running.started, 0 if ended else resident(running.process)
    if not ended and seconds < TIME_LIMIT and memory < MEMORY_LIMIT:
        return None
    if not ended:
        os.killpg(running.process, signal.SIGKILL)
        usage = os.wait4(running.process, 0)[2]
    code = os.waitstatus_to_exitcode(status) if ended else None
    return Outcome(code, (running.folder / OUTPUT).read_bytes(), seconds, usage.ru_maxrss * 1024)


def resident(process: int) -> int:
    """Bytes of main memory that the process holds."""
    return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * resource.getpagesize()


def _run_entry(case: Case, folder: Path) -> None:
    """In the child: never returns."""
    status = 70
    try:
        os.setsid()
        file = os.open(folder / OUTPUT, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, 1)
        os.dup2(file, 2)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        os.chdir(folder)
        os.environ["PATH"] = f"{runs.fake_programs(folder)}:{os.environ['PATH']}"
        os.environ["TORCH_HOME"] = str(folder / "cache")
        sys.addaudithook(_watch)
        try:
            importlib.import_module(case.entry).main([str(word) for word in case.argv])
            status = 0
        except SystemExit as error:
            status = error.code if isinstance(error.code, int) else 0 if error.code is None else 1
        except BaseException:
            import traceback

            traceback.print_exc()
            status = 1
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(status)


def _watch(event: str, args: tuple[Any, ...]) -> None:
    """Audit hook of the child: programs started, and classes taken out of pickles, are
    written to the output.
    """
    if event in ("subprocess.Popen", "os.posix_spawn", "os.exec"):
        program = os.fsdecode(args[0]) if args[0] else ""
        if Path(program).name not in [Path(name).name for name in ALLOWED_PROGRAMS]:
            os.write(2, f"\nFUZZ: started {program}\n".encode())
    elif event == "os.system":
        os.write(2, f"\nFUZZ: os.system {args}\n".encode())
    elif event == "pickle.find_class" and args[0] not in ("collections", "torch._utils", "torch"):
        os.write(2, f"\nFUZZ: unpickled {args[0]}.{args[1]}\n".encode())


def faults_of(case: Case, outcome: Outcome, folder: Path) -> list[str]:
    """What is wrong with how a case ended; empty: nothing."""
    text, faults = outcome.output, []
    if outcome.status is None:
        faults.append("did not end" if outcome.memory < MEMORY_LIMIT else "too much memory")
    elif outcome.status not in (0, 2):
        faults.append(f"status {outcome.status}")
    if b"Traceback (most recent call last)" in text:
        faults.append("traceback")
    if b"FUZZ: " in text or (folder / runs.CANARY).exists():
        faults.append("code run")
    if CONTROL.search(text):
        faults.append("control characters in the output")
    if runs.SECRET.encode() in text:
        faults.append("secret in the output")
    if outcome.status == 2 and b"error: " not in text:
        faults.append("status 2 without a sentence")
    if outcome.status == 0:
        silent = not case.named or not any(name.encode() in text for name in case.named)
        if case.must_fail or (case.must_name and silent):
            faults.append("silent success")
        elif case.check is not None and (complaint := case.check(folder)):
            faults.append(f"silent success: {complaint}")
    return faults


def make_case(number: int, seed: int, kinds: list[str], shared: Path, folder: Path) -> Case:
    folder.mkdir(parents=True, exist_ok=True)
    return CASES[kinds[number % len(kinds)]](random.Random(f"{seed} {number}"), shared, folder)


def run(numbers: list[int], seed: int, kinds: list[str], jobs: int, keep: Path | None = None) -> int:
    """How many cases had faults, after printing them and the counts."""
    prepare()
    counts = {kind: Counter[str]() for kind in kinds}
    with tempfile.TemporaryDirectory(prefix="fuzz-") as name:
        shared = runs.shared_files(Path(name) / "shared")
        waiting, running = iter(numbers), list[Running]()
        while True:
            while len(running) < jobs and (number := next(waiting, None)) is not None:
                folder = keep or Path(name) / str(number)
                running.append(start_case(number, make_case(number, seed, kinds, shared, folder), folder))
            if not running:
                break
            time.sleep(0.02)
            for each in running[:]:
                if (outcome := outcome_of(each)) is not None:
                    running.remove(each)
                    report(each, outcome, counts[each.case.kind])
                    if keep is None:
                        shutil.rmtree(each.folder, ignore_errors=True)
    for kind, count in counts.items():
        wrong = ", ".join(f"{value} {what}" for what, value in count.items() if what not in COUNTED)
        print(
            f"{kind:<8} {count['cases']} cases: {count['refused']} refused, {count['ran']} ran; "
            f"{wrong or 'no faults'}"
        )
    failed = sum(count["with faults"] for count in counts.values())
    print(f"{sum(count['cases'] for count in counts.values())} cases, {failed} with faults")
    return failed


def report(done: Running, outcome: Outcome, count: Counter[str]) -> None:
    """Count a case; print it where something is wrong."""
    case, faults = done.case, faults_of(done.case, outcome, done.folder)
    count["cases"] += 1
    count["refused" if outcome.status == 2 else "ran"] += 1
    count.update(faults)
    if faults:
        count["with faults"] += 1
        print(
            f"case {done.number}: {case.what}\n  {case.entry} {' '.join(map(str, case.argv))}\n  "
            f"{'; '.join(faults)}"
        )
        for line in outcome.output.decode(errors="replace").strip().splitlines()[-3:]:
            print(f"  | {ascii(line)[1:-1][:300]}", flush=True)


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--cases", type=arguments.positive, default=1000, help="how many to run (default: %(default)s)"
    )
    parser.add_argument(
        "--seed", type=arguments.seed, default=0, help="the cases follow from it (default: %(default)s)"
    )
    parser.add_argument(
        "--kinds", nargs="+", choices=CASES, default=list(CASES), help="what is damaged (default: all)"
    )
    parser.add_argument(
        "--jobs",
        type=arguments.positive,
        default=os.cpu_count() or 1,
        help="cases at a time (default: one per core)",
    )
    parser.add_argument("--only", type=arguments.not_negative, nargs="+", help="run these cases alone")
    parser.add_argument(
        "--keep", type=arguments.expand_home, help="with one case of --only: keep its files here"
    )
    return parser


def main() -> int:
    args = get_parser().parse_args()
    numbers = args.only or list(range(args.cases))
    return 1 if run(numbers, args.seed, args.kinds, args.jobs, Path(args.keep) if args.keep else None) else 0


if __name__ == "__main__":
    raise SystemExit(main())
