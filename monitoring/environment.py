"""environment.json: on what, with which code and by which command a run was started."""

from __future__ import annotations

import functools
import importlib.metadata
import json
import os
import platform
import re
import shlex
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import arguments
from checkpoint_io import checkpoints
from errors import hide_secrets
from monitoring.run_files import set_aside
from runtime import distributed

ENVIRONMENT = "environment.json"
ROOT = Path(__file__).parent.parent
MOST_BYTES = 2**20  # of the diff
MOST_NAMES = 200  # of files that git does not know
GIT_SECONDS = 10
# variables that change what a run computes, how fast, or where
VARIABLES = re.compile(
    r"(OMP|MKL|KMP|GOMP|OPENBLAS|CUDA|CUBLAS|CUDNN|NVIDIA|NCCL|GLOO|TORCH\w*|PYTORCH|TRITON|SLURM|PMI\w*|"
    r"OMPI_COMM_WORLD|MASTER|LOCAL|GROUP|ROLE|HF|HUGGINGFACE|WANDB|MLFLOW|TRACKIO|TENSORBOARD|MALLOC|CONDA|"
    r"PYTHON)_\w+|RANK|WORLD_SIZE|VIRTUAL_ENV|LD_PRELOAD|LD_LIBRARY_PATH|PYTHON[A-Z]+|CC|CXX"
)
HIDDEN = "***"
SECRET_WORDS = {
    "token",
    "password",
    "passwd",
    "pass",
    "passphrase",
    "pwd",
    "secret",
    "credential",
    "credentials",
    "jwt",
    "cookie",
}
KEYS = re.compile(r"(^|_)(api|access|secret|private|account)_?key($|_)")
# what a token looks like, wherever it stands; a header that holds one; one in quotes
TOKEN = re.compile(
    r"\b(?:hf_\w{16,}|gh[pousr]_\w{20,}|github_pat_\w{20,}|glpat-[\w-]{16,}|sk-[\w-]{20,}|AKIA[0-9A-Z]{16}|"
    r"xox[abprs]-[\w-]{10,}|eyJ[\w-]{10,}\.[\w-]{10,}\.[\w-]*)"
)
HEADER = re.compile(r"(?i)(\bauthorization\s*[:=]\s*(?:(?:bearer|basic|token)\s+)?|\bbearer\s+)[^\s'\"]+")
ASSIGNED = re.compile(
    r"(?i)((?:password|passwd|pwd|secret|token|api_?key|access_?key|private_?key)[\"']?\s*[=:]\s*([\"']))"
    r"[^\"'\n]{6,}(?=\2)"
)


def write(
    folder: Path | None,
    typed: arguments.Flags,
    flags: Mapping[str, Any],
    device: torch.device,
    first_step: int,
) -> None:
    """Of this start of a run; those of its earlier starts are kept inside. All ranks
    call it, rank 0 writes.

    typed, flags: those of the run, as they were parsed and as plain data.
    first_step: where the run goes on; 0: it is a new one.
    """
    here = f"{socket.gethostname()}: {name_device(device)}"
    processes = Counter(distributed.gather_objects(here))
    if folder is None or not distributed.is_main():
        return
    facts = {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "step": first_step,
        "command": quote_command(typed.words),
        "directory": os.getcwd(),
        "flags_given": {name: flags[name] for name in sorted(typed.given) if name in flags},
        "flags": dict(flags),
        **describe_code(),
        **describe_software(),
        **describe_machine(),
        "world_size": distributed.world_size(),
        "processes": dict(processes),
        "variables": {name: value for name, value in sorted(os.environ.items()) if VARIABLES.fullmatch(name)},
    }
    facts = mask_secrets(facts)
    path = folder / ENVIRONMENT
    before = read(path)
    if first_step == 0 or before is None:
        set_aside(path, time.strftime("%Y%m%d-%H%M%S"))
        earlier = []
    else:
        earlier = [*before.pop("earlier", []), what_differed(before, facts)]
    checkpoints.write_json(folder, ENVIRONMENT, facts | {"earlier": earlier})


def read(path: Path) -> dict[str, Any] | None:
    """None where there is none, or something else of that name."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) and isinstance(content.get("earlier", []), list) else None


def what_differed(before: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """An earlier start, without what the next one repeats."""
    return {name: value for name, value in before.items() if name not in now or now[name] != value}


# ── What is described ──


def quote_command(words: Sequence[str]) -> str | None:
    """The command line as a shell takes it, from `directory`; None where it was no
    command but a call of `main`.
    """
    if list(words) != [word for word in sys.argv[1:] if not word or word.strip()]:
        return None
    nodes = os.environ.get("WORLD_SIZE"), os.environ.get("LOCAL_WORLD_SIZE")
    launcher = ["python"]
    if "TORCHELASTIC_RUN_ID" in os.environ and nodes[0] and nodes[1]:
        launcher = ["torchrun", f"--nnodes={int(nodes[0]) // int(nodes[1])}", f"--nproc_per_node={nodes[1]}"]
    return shlex.join([*launcher, sys.argv[0], *mask_words(words)])


@functools.cache
def describe_code() -> dict[str, Any]:
    """Which code runs: read once, as it was when the process began."""
    commit = git("rev-parse", "HEAD").decode().strip() or None
    diff = git("diff", "HEAD", "--no-color", "--no-ext-diff", "--no-textconv", "--", ".", most=MOST_BYTES + 1)
    others = git("ls-files", "--others", "--exclude-standard", "--", "*.py", "*.sh").decode(errors="replace")
    return {
        "commit": commit,
        "diff": None if commit is None else diff[:MOST_BYTES].decode(errors="replace"),
        "diff_cut": len(diff) > MOST_BYTES,
        "untracked": others.splitlines()[:MOST_NAMES],
    }


def git(*words: str, most: int = MOST_BYTES) -> bytes:
    """Up to `most` bytes of what git says of our folder; none where there is no git or
    no repository.
    """
    command = ["git", "-C", str(ROOT), *words]
    quietly = os.environ | {"GIT_OPTIONAL_LOCKS": "0"}
    try:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, stdin=subprocess.DEVNULL, env=quietly
        )
    except OSError:
        return b""
    with process:
        timer = threading.Timer(GIT_SECONDS, process.kill)
        timer.start()
        assert process.stdout is not None
        said = process.stdout.read(most)
        enough = len(said) == most
        if enough:
            process.kill()
        process.stdout.close()
        failed = process.wait() != 0
        timer.cancel()
    return b"" if failed and not enough else said


@functools.cache
def describe_software() -> dict[str, Any]:
    found = importlib.metadata.distributions()
    packages = {str(one.metadata["Name"]): one.version for one in found if one.metadata["Name"]}
    return {
        "packages": dict(sorted(packages.items(), key=lambda item: item[0].lower())),
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if torch.cuda.device_count() else None,
    }


@functools.cache
def describe_machine() -> dict[str, Any]:
    """Of this process; memory in bytes."""
    memory = None
    if hasattr(os, "sysconf") and {"SC_PHYS_PAGES", "SC_PAGE_SIZE"} <= os.sysconf_names.keys():
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    gpus = range(torch.cuda.device_count())
    return {
        "host": socket.gethostname(),
        # not platform.platform(), which starts a program to ask for the processor
        "system": " ".join((platform.system(), platform.release(), platform.machine())),
        "gpu": [torch.cuda.get_device_name(number) for number in gpus],
        "cpu": name_cpu(),
        "cores": cores,
        "memory": memory,
    }


def name_cpu() -> str:
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1] if found else platform.machine()


def name_device(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


# ── What is left out ──


def mask_secrets(value: Any, name: str = "") -> Any:
    """Plain data without passwords, tokens and what signs a URL; also not the values of
    names that say that they are one.
    """
    if is_secret(name) and value not in (None, "", False, True):
        return HIDDEN
    if isinstance(value, dict):
        return {key: mask_secrets(item, str(key)) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [mask_secrets(item) for item in value]
    return mask_text(value) if isinstance(value, str) else value


def mask_words(words: Sequence[str]) -> list[str]:
    """Of a command line."""
    shown, name = [], ""
    for word in words:
        if word.startswith("--"):
            flag, equals, value = word.partition("=")
            name = flag.lstrip("-")
            shown.append(flag + equals + str(mask_secrets(value, name)))
        else:
            shown.append(str(mask_secrets(word, name)))
    return shown


def mask_text(text: str) -> str:
    text = TOKEN.sub(HIDDEN, hide_secrets(text))
    return ASSIGNED.sub(rf"\g<1>{HIDDEN}", HEADER.sub(rf"\g<1>{HIDDEN}", text))


def is_secret(name: str) -> bool:
    """`HF_TOKEN`, `WANDB_KEY`, `hub_api_key`; not `tokenizer_weight`, nor `model_key`."""
    words = SECRET_WORDS | ({"key", "auth"} if name.isupper() else set())
    name = name.lower().replace("-", "_")
    return bool(words & set(name.split("_"))) or KEYS.search(name) is not None
