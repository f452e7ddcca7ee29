"""`pip install -e .` brings what the scripts need, and none of their modules, whose
names (datasets, engine) others bear too.
"""

import email
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from source_files import ROOT

pytest.importorskip("setuptools", minversion="77")


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """The files at the root and the folders of modules: a build writes into its
    folder.
    """
    folder = tmp_path_factory.mktemp("project")
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy(path, folder)
        elif (path / "__init__.py").exists():
            shutil.copytree(path, folder / path.name, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def requirements(name):
    lines = (ROOT / name).read_text().splitlines()
    return {str(Requirement(line)) for line in lines if line and not line.startswith("#")}


def test_the_dependencies_are_those_of_the_files(project, tmp_path):
    code = (
        f"from setuptools import build_meta; build_meta.prepare_metadata_for_build_wheel({str(tmp_path)!r})"
    )
    subprocess.run([sys.executable, "-c", code], cwd=project, check=True, capture_output=True)
    metadata = email.message_from_string(next(tmp_path.glob("*.dist-info/METADATA")).read_text())
    found = [Requirement(line) for line in metadata.get_all("Requires-Dist")]
    for extra, file in (("", ""), ("dev", "-dev"), ("demo", "-demo")):
        named = {str(r).split(";")[0].strip() for r in found if extra in str(r.marker or "")}
        named = named if extra else {str(r) for r in found if r.marker is None}
        assert named == requirements(f"requirements{file}.txt"), extra


@pytest.mark.slow
def test_an_editable_install_brings_no_module(project, tmp_path):
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "env"], check=True)
    python = tmp_path / "env" / "bin" / "python"
    # setuptools from here: a test needs no network
    here = os.environ | {"PYTHONPATH": sysconfig.get_path("purelib")}
    install = [
        python,
        "-m",
        "pip",
        "install",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "-e",
        project,
    ]
    subprocess.run(install, check=True, capture_output=True, env=here)
    code = (
        "import importlib.metadata, importlib.util, sys; print(importlib.metadata.version(sys.argv[1])); "
        "print([name for name in sys.argv[2:] if importlib.util.find_spec(name)])"
    )
    ours = [path.stem for path in project.glob("*.py")] + [
        path.parent.name for path in project.glob("*/__init__.py")
    ]
    assert {"datasets", "engine", "layers"} <= set(ours)
    said = subprocess.run(
        [python, "-c", code, "beitv2-pretraining", *ours],
        cwd=tmp_path,
        check=True,
        capture_output=True,
        text=True,
    )
    assert said.stdout.split() == ["0.1.0", "[]"]
    site = Path(
        subprocess.check_output(
            [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], text=True
        ).strip()
    )
    assert not {path.stem for path in site.glob("*.py")} & set(ours)
