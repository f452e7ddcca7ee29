"""One thread per test process: the suite runs in parallel processes, and tiny models
gain nothing from more.
"""

import logging
import os
import signal
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import tiny_data
import tiny_runs
import tiny_segmentation
import torch
from source_files import load_script

from runtime import terminal

torch.set_num_threads(1)
if hasattr(signal, "SIGHUP"):  # under nohup it is ignored, here and by every process that a test starts
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _logger_as_it_was():
    """A `main` sets up the project's logger; without this, what a later test captures
    of it depends on the order of tests.
    """
    log = logging.getLogger("beit")
    before = log.handlers[:], log.level, log.propagate
    terminal.log_once.cache_clear()
    yield
    log.handlers[:], log.level, log.propagate = before


@pytest.fixture(autouse=True)
def _signals_as_they_were():
    """A `main` that trains handles signals to its process's end; here the process is
    pytest's.
    """
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Sixteen photos of two classes; read-only, as all of these: the tests of a module
    share them.
    """
    return tiny_runs.photos(tmp_path_factory.mktemp("photos"))


@pytest.fixture(scope="module")
def ten_photos(tmp_path_factory) -> Path:
    """Batches of 3 or 4 leave a rest."""
    return tiny_runs.photos(tmp_path_factory.mktemp("photos"), per_class=5)


@pytest.fixture(scope="module")
def tokenizer_weight(tmp_path_factory) -> Path:
    """The file of a tokenizer of random weights."""
    return tiny_runs.tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer.pth")


@pytest.fixture(scope="module")
def flat(tmp_path_factory) -> Path:
    """Twelve different images in nested folders."""
    root = tmp_path_factory.mktemp("flat")
    for i in range(12):
        tiny_data.write_image(root / f"part{i % 2}" / f"{i:02}.jpg", seed=i)
    return root


@pytest.fixture(scope="module")
def pair_folder(tmp_path_factory) -> Path:
    """Five training pairs, two of validation."""
    root = tmp_path_factory.mktemp("pairs")
    for seed in range(5):
        tiny_segmentation.write_pair(root, f"{seed}", seed=seed)
    for seed in range(2):
        tiny_segmentation.write_pair(root, f"nested/{seed}", "val", seed=10 + seed)
    return root


@pytest.fixture(scope="module")
def make_shards():
    return load_script("make_shards").main


@pytest.fixture(scope="module")
def shard_photos(tmp_path_factory):
    return tiny_runs.photos(tmp_path_factory.mktemp("photos"), per_class=12)


@pytest.fixture(scope="module")
def packed(shard_photos, make_shards, tmp_path_factory):
    """24 labeled photos in five shards."""
    out = tmp_path_factory.mktemp("shards")
    make_shards([str(shard_photos), str(out), "--images_per_shard", "5", "--classes"])
    return out


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where downloads are cached: a folder of this test's own."""
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    for name in ("BEIT_ALLOW_HTTP", "BEIT_MIRRORS"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "home" / "hub" / "checkpoints"
