"""Weight files of every origin: read as tensors, never run, damage named."""

from __future__ import annotations

import argparse
import collections
import pathlib
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from file_server import BODY
from tiny_runs import RunsCode

from checkpoint_io import weight_files
from checkpoint_io.pickle_builders import PickledObject
from errors import UserError


# ── reading ──
@pytest.mark.parametrize("new_format", [True, False])
def test_pickled_code_is_refused_and_not_run(tmp_path: pathlib.Path, new_format: bool) -> None:
    trace, path = tmp_path / "trace", tmp_path / "bad.pth"
    torch.save(
        {"model": {"w": torch.ones(2)}, "x": RunsCode(trace)},
        path,
        _use_new_zipfile_serialization=new_format,
    )
    with pytest.raises(UserError, match=r"bad\.pth holds Python objects \(\w+\.system\)"):
        weight_files.load_file(path)
    assert not trace.exists()


@pytest.mark.parametrize("new_format", [True, False])
def test_a_pickled_module_is_read_where_its_classes_are_named(
    tmp_path: pathlib.Path, new_format: bool
) -> None:
    path, module = tmp_path / "module.pth", torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 2))
    torch.save({"model": module, "module": "module"}, path, _use_new_zipfile_serialization=new_format)
    names = ["torch.nn.modules.container.Sequential", "torch.nn.modules.linear.Linear"]
    with pytest.raises(UserError, match=names[0]):
        weight_files.load_file(path)
    with pytest.raises(UserError, match=names[1]):
        weight_files.load_file(path, names[:1])
    loaded = weight_files.load_file(path, names)
    assert type(loaded["model"]) is PickledObject
    assert loaded["model"].class_name == names[0]
    first = vars(loaded["model"])["_modules"]["0"]
    assert torch.equal(vars(first)["_parameters"]["weight"], module[0].weight)
    assert loaded["module"] == "module"


@pytest.mark.parametrize("new_format", [True, False])
def test_flags_and_numpy_values_are_read(tmp_path: pathlib.Path, new_format: bool) -> None:
    content: dict[str, Any] = {
        "model": collections.OrderedDict(w=torch.arange(6.0).view(2, 3)),
        "args": argparse.Namespace(lr=np.float64(1.5e-3), betas=[0.9, 0.98], steps=np.int64(7), out=tmp_path),
        "best": np.float32(2),
    }
    torch.save(content, tmp_path / "c.pth", _use_new_zipfile_serialization=new_format)
    loaded = weight_files.load_file(tmp_path / "c.pth")
    assert vars(loaded["args"]) == {**vars(content["args"]), "out": str(tmp_path)}
    assert loaded["best"] == 2
    assert torch.equal(loaded["model"]["w"], content["model"]["w"])


def test_numpy_scalars_under_the_other_numpys_names(tmp_path: pathlib.Path) -> None:
    name = np.float64(0).__reduce__()[0].__module__.encode()  # type: ignore[index, union-attr]
    other = b"numpy.core.multiarray" if b"_core" in name else b"numpy._core.multiarray"
    torch.save({"x": np.float64(0.5)}, tmp_path / "n.pth", _use_new_zipfile_serialization=False)
    raw = (tmp_path / "n.pth").read_bytes()
    assert name in raw
    (tmp_path / "n.pth").write_bytes(raw.replace(b"c" + name + b"\n", b"c" + other + b"\n"))
    assert weight_files.load_file(tmp_path / "n.pth") == {"x": 0.5}


def test_safetensors_and_torchscript(tmp_path: pathlib.Path) -> None:
    weights = {"a.weight": torch.randn(3, 2), "b": torch.arange(3)}
    safetensors.torch.save_file(weights, tmp_path / "w.safetensors")
    linear = torch.nn.Sequential(torch.nn.Linear(2, 3))
    torch.jit.trace(linear, torch.ones(1, 2)).save(str(tmp_path / "script.pt"))
    for path, wanted in (("w.safetensors", weights), ("script.pt", linear.state_dict())):
        loaded = weight_files.load_state_dict(str(tmp_path / path))
        assert loaded.keys() == wanted.keys()
        assert all(torch.equal(loaded[key], wanted[key]) for key in wanted)


@pytest.mark.parametrize(
    "kind", ["empty", "half", "half of the old format", "html", "noise", "zip", "safetensors"]
)
def test_damaged_files_are_named(tmp_path: pathlib.Path, kind: str) -> None:
    path = tmp_path / ("w.safetensors" if kind == "safetensors" else "w.pth")
    torch.save({"w": torch.ones(20_000)}, path, _use_new_zipfile_serialization=kind == "half")
    whole = path.read_bytes()
    path.write_bytes(
        {
            "half": whole[: len(whole) // 2],
            "half of the old format": whole[: len(whole) // 2],
            "html": b"<html>404</html>",
            "noise": BODY[:1000],
            "zip": b"PK\x05\x06" + bytes(18),
        }.get(kind, b"")
    )
    with pytest.raises(UserError, match=f"{path.name} is not a weight file, or is incomplete"):
        weight_files.load_file(path)


def test_state_dict_is_found_under_its_key(tmp_path: pathlib.Path) -> None:
    one, two = {"w": torch.ones(1)}, {"w": torch.full((1,), 2.0)}

    def load(content: Any, keys: str = "model|module") -> float:
        torch.save(content, tmp_path / "w.pth")
        return weight_files.load_state_dict(str(tmp_path / "w.pth"), keys)["w"].item()

    assert load({"module": two, "model": one, "epoch": 3}) == 1
    assert load({"module": two, "model": one}, "model_ema|module") == 2
    assert load({"state_dict": two, "w": torch.ones(1)}) == 2
    assert load({**one, "epoch": 3}) == 1
    for empty in ({"optimizer": {}, "epoch": 3}, [1, 2], {"model": {"epoch": 3}}):
        with pytest.raises(UserError, match=r"holds no weights|is not a tensor but of type int"):
            load(empty)
