"""scripts/launch.sh: the user's flags and folders, GPUs and machines, and what it
refuses.
"""

import os
import re
import shlex
import subprocess

import pytest
from recipe_runs import RECIPES, SHELL_FILES, call, dry_run
from source_files import ROOT


@pytest.mark.parametrize("path", SHELL_FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_shell_syntax(path):
    done = subprocess.run(["bash", "-n", str(path)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", RECIPES)
def test_missing_data_is_one_clear_sentence(name):
    done = call(name, OUTPUT="/out")
    assert done.returncode == 2
    assert re.fullmatch(
        rf"error: DATA is not set; scripts/{name}\.sh runs as: DATA=/\S+ OUTPUT=/\S+ " r"bash .*\n",
        done.stderr,
    )


FLAWED = [
    ({"DATA": "/"}, "OUTPUT is not set"),
    ({"DATA": "/no/such", "OUTPUT": "/out"}, "DATA=/no/such: no such folder"),
    ({"DATA": "/", "OUTPUT": "/out", "GPUS": "none"}, "GPUS=none: give a whole number"),
    ({"DATA": "/", "OUTPUT": "/out"}, "4 machines: MASTER_ADDR must be"),
    (
        {"DATA": "/", "OUTPUT": "/out", "MASTER_ADDR": "node0"},
        "NODE_RANK=: each of the 4 machines needs its own number, 0 to 3",
    ),
    (
        {"DATA": "/", "OUTPUT": "/out", "MASTER_ADDR": "node0", "NODE_RANK": "4"},
        "NODE_RANK=4: each of the 4 machines",
    ),
    (
        {"DATA": "/", "OUTPUT": "/out", "MASTER_ADDR": "node0", "SLURM_STEP_NUM_TASKS": "4"},
        "srun started 4 tasks, but",
    ),
]


@pytest.mark.parametrize(("environment", "message"), FLAWED)
def test_what_cannot_be_launched_is_refused(environment, message):
    done = call("pretrain/large_300e", **environment)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert message in done.stderr
    assert done.stdout == ""


def test_paths_count_from_the_caller_and_may_hold_spaces(tmp_path):
    (tmp_path / "my photos").mkdir()
    done = call("pretrain/base_300e", cwd=tmp_path, DATA="my photos", OUTPUT="out", DRY_RUN="1")
    words = shlex.split(done.stdout)
    assert words[words.index("--data_path") + 1] == str(tmp_path / "my photos")
    assert words[words.index("--output_dir") + 1] == str(tmp_path / "out")


def test_the_callers_flags_win():
    run = dry_run(
        "pretrain/base_300e", "--lr", "1e-3", "--opt_betas", "0.8", "0.9", "--update_freq", "4", GPUS="2"
    )
    assert (run.args.lr, run.args.opt_betas, run.gpus, run.batch) == (1e-3, [0.8, 0.9], 2, 1024)


def test_several_machines_find_each_other():
    launcher = dry_run("pretrain/large_300e", NODE_RANK="3", MASTER_PORT="1234").launcher
    assert " ".join(launcher) == (
        "torchrun --nnodes 4 --nproc_per_node 16 --master_port 1234 --node_rank 3 --master_addr node0"
    )


def test_under_srun_no_second_launcher_is_started():
    done = call("pretrain/base_300e", DATA="/", OUTPUT="/out", DRY_RUN="1", SLURM_STEP_NUM_TASKS="16")
    assert done.stdout.startswith("python run_beitv2_pretraining.py ")


def test_the_launcher_gets_the_flags_as_they_are(tmp_path):
    """Not a dry run: a stand-in for torchrun prints its arguments."""
    (tmp_path / "torchrun").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\nexit 3\n')
    (tmp_path / "torchrun").chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    done = call("vqkd/base_3x768x12_clip", "--log_dir", "a b", PATH=path, DATA=str(tmp_path), OUTPUT="/out")
    assert done.returncode == 3  # the launcher's own status
    words = done.stdout.splitlines()
    assert words[:4] == ["--nnodes", "1", "--nproc_per_node", "8"]
    assert words[-2:] == ["--log_dir", "a b"]
