"""Weight files that are packed, damaged or programmed by hand, and how they are
refused.
"""

import time
import zipfile

import pytest
import torch

from checkpoint_io import weight_files
from errors import UserError

WEIGHTS = {"a.weight": torch.arange(6.0).view(2, 3), "a.bias": torch.ones(2, dtype=torch.bfloat16)}


def repack(path, change=lambda name, content: content, **how):
    """The zip archive at `path` written again, its parts changed."""
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", **how) as archive:
        for name, content in parts.items():
            archive.writestr(name, change(name, content))


def with_pickle(path, program):
    """A file of torch.save whose pickle is `program`, with one storage of 4 floats
    beside it.
    """
    torch.save({"w": torch.zeros(4)}, path)
    repack(path, lambda name, content: program if name.endswith("data.pkl") else content)
    return path


def refusal(path):
    start = time.process_time()
    with pytest.raises(UserError) as refused:
        weight_files.load_state_dict(path)
    assert time.process_time() - start < 30
    assert str(path) in str(refused.value)
    assert "\n" not in str(refused.value)
    return str(refused.value)
