"""What the shell files in scripts/ would run, parsed."""

import functools
import os
import shlex
import subprocess
from pathlib import Path
from types import SimpleNamespace

from source_files import ROOT

import arguments
import run_beitv2_pretraining
import run_class_finetuning
import run_linear_eval
import run_segmentation_finetuning
import run_vqkd_training

SHELL_FILES = sorted((ROOT / "scripts").rglob("*.sh"))


RECIPES = {
    f"{path.parent.name}/{path.stem}": path.read_text()
    for path in SHELL_FILES
    if "\nlaunch run_" in path.read_text()
}


ABLATION_FILES = {path.stem: path.read_text() for path in SHELL_FILES if path.parent.name == "ablations"}


ENTRIES = {
    "run_vqkd_training.py": run_vqkd_training,
    "run_beitv2_pretraining.py": run_beitv2_pretraining,
    "run_class_finetuning.py": run_class_finetuning,
    "run_linear_eval.py": run_linear_eval,
    "run_segmentation_finetuning.py": run_segmentation_finetuning,
}


def call(name: str, *flags: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess:
    """bash scripts/NAME.sh with nothing else in its environment."""
    command = ["bash", str(ROOT / "scripts" / f"{name}.sh"), *flags]
    environment = {"PATH": os.environ["PATH"], **environment}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=60)


@functools.cache  # a shell and a parser each time; what comes back is only read
def dry_run(name: str, *flags: str, **environment: str) -> SimpleNamespace:
    """What the recipe would run: the launcher's words, nodes, GPUs per node, the
    script's flags as typed and as parsed.
    """
    defaults = {"DRY_RUN": "1", "DATA": "/data", "OUTPUT": "/out", "NODE_RANK": "0", "MASTER_ADDR": "node0"}
    done = call(name, *flags, **{**defaults, **environment})
    assert done.returncode == 0, done.stderr
    words = shlex.split(done.stdout)
    at = next(i for i, word in enumerate(words) if word in ENTRIES)
    entry, launcher = ENTRIES[words[at]], words[:at]
    args = arguments.parse(entry.get_parser(), words[at + 1 :])
    nodes, gpus = (int(launcher[launcher.index(flag) + 1]) for flag in ("--nnodes", "--nproc_per_node"))
    batch = nodes * gpus * args.batch_size * args.update_freq
    return SimpleNamespace(
        entry=entry, launcher=launcher, gpus=nodes * gpus, batch=batch, flags=words[at + 1 :], args=args
    )


def expect(run: SimpleNamespace, **values: object) -> None:
    """Each flag is written out in the recipe (a changed default must not change it) and
    has this value.
    """
    for name, value in values.items():
        assert f"--{name}" in run.flags, name
        assert getattr(run.args, name) == value, name
