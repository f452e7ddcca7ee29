"""OpenMP's threads spin for a bounded time in every command, unless the user says
otherwise.
"""

import openmp_spin

import ast
import json
import os
import subprocess
import sys

import pytest
from source_files import ROOT

import benchmark
from benchmarks import contention

COMMANDS = sorted(
    path for path in ROOT.glob("*.py") if "report_user_errors\ndef main" in path.read_text(encoding="utf-8")
)


def test_spins_are_bounded_unless_the_user_chose():
    environ = {"HOME": "/"}
    openmp_spin.bound(environ)
    assert environ == {"HOME": "/", "GOMP_SPINCOUNT": str(openmp_spin.SPINS)}
    for name in openmp_spin.USERS_CHOICE:
        openmp_spin.bound(environ := {name: "7"})
        assert environ == {name: "7"}


@pytest.mark.parametrize("path", COMMANDS, ids=lambda path: path.stem)
def test_commands_bound_it_before_all_other_imports(path):
    imports = [
        node for node in ast.parse(path.read_text()).body if isinstance(node, ast.Import | ast.ImportFrom)
    ]
    names = [
        alias.name for node in imports for alias in node.names if getattr(node, "module", "") != "__future__"
    ]
    assert names[0] == "openmp_spin"


def test_a_command_sets_it_for_its_process_and_its_children():
    code = "import model_zoo, os; print(os.environ['GOMP_SPINCOUNT'])"
    environ = {name: value for name, value in os.environ.items() if name not in openmp_spin.USERS_CHOICE}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(openmp_spin.SPINS)]


@pytest.mark.slow
def test_contention_measures_alone_and_beside_others(tmp_path, monkeypatch):
    monkeypatch.setattr(contention, "WAYS", {"ours": {}})
    output = tmp_path / "out.json"
    flags = "--device cpu --model demo --batch_size 1 --rounds 1 --warmup 1 --stage contention".split()
    benchmark.main([*flags, "--output", str(output)])
    (contest,) = json.loads(output.read_text())["contests"]
    assert [row["name"] for row in contest["rows"]] == ["ours", "ours, busy"]
    assert all(row["ms"]["step"] > 0 for row in contest["rows"])
