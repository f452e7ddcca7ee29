"""Weight files from strangers: read as torch.load reads them, or refused by name;
nothing in them runs.
"""

import ast
import os
import pickle
import struct
from collections import Counter, OrderedDict, defaultdict

import numpy as np
import pytest
import torch
from odd_files import WEIGHTS, refusal, repack, with_pickle
from source_files import all_files

from checkpoint_io import torch_files, weight_files


class Call:
    """Pickled as a call of `function` with `arguments`."""

    def __init__(self, function, *arguments, state=None):
        self.call = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self):
        return self.call


# ── what is read ──


@pytest.mark.parametrize("new_format", [True, False])
def test_the_same_as_torch_reads(tmp_path, new_format):
    base = torch.randn(8, 6)
    dtypes = [
        torch.float64,
        torch.float16,
        torch.int64,
        torch.int32,
        torch.int16,
        torch.int8,
        torch.uint8,
        torch.bool,
    ]
    content = {
        "model": OrderedDict(
            {str(dtype): torch.randint(0, 2, (3, 2)).to(dtype) for dtype in dtypes},
            transposed=base.t(),
            part=base[2:5, 1:4],
            scalar=torch.tensor(3.5),
            empty=torch.empty(0, 7),
            parameter=torch.nn.Parameter(base.clone()),
            whole=base,
            bf16=base.bfloat16(),
        ),
        "optimizer": {
            "state": {0: {"step": torch.tensor(7.0)}},
            "param_groups": [{"betas": (0.9, 0.98), "params": [0]}],
        },
        "epoch": 3,
        "note": "ü",
        "raw": b"\x00\xff",
        "none": None,
        "set": {1, 2},
        "big": 10**30,
        "size": base.shape,
        "count": Counter("aab"),
        "default": defaultdict(list, {"k": [1]}),
        "dtype": torch.float16,
        "on": [True, 0.1],
    }
    torch.save(content, tmp_path / "f.pth", _use_new_zipfile_serialization=new_format)
    wanted = torch.load(tmp_path / "f.pth", weights_only=False)
    got = torch_files.load(tmp_path / "f.pth")
    for key, tensor in wanted.pop("model").items():
        assert torch.equal(got["model"][key], tensor), key
        assert (got["model"][key].dtype, got["model"][key].stride()) == (tensor.dtype, tensor.stride())
    del got["model"]
    assert got == wanted


@pytest.mark.parametrize("new_format", [True, False])
@pytest.mark.parametrize("protocol", [1, 2, 3, 4, 5])
def test_every_protocol_of_pickle(tmp_path, protocol, new_format):
    torch.save(
        WEIGHTS, tmp_path / "f.pth", pickle_protocol=protocol, _use_new_zipfile_serialization=new_format
    )
    assert all(
        torch.equal(value, WEIGHTS[key]) for key, value in torch_files.load(tmp_path / "f.pth").items()
    )
    torch.save(WEIGHTS, tmp_path / "f.pth", pickle_protocol=0, _use_new_zipfile_serialization=new_format)
    assert "pickle_protocol=0" in refusal(tmp_path / "f.pth")


def test_negated_and_conjugated_views_keep_their_sign(tmp_path):
    z = torch.randn(3, 4, dtype=torch.complex64)
    for view in (z.conj().imag, z.conj()):
        torch.save({"w": view}, tmp_path / "f.pth")
        assert view.is_neg() or view.is_conj()
        assert torch.equal(torch_files.load(tmp_path / "f.pth")["w"], view)


@pytest.mark.parametrize(
    "value", [np.float64(0.1), np.float32(-2.5), np.int64(-7), np.uint8(200), np.bool_(True)]
)
def test_numbers_of_numpy_become_pythons(tmp_path, value):
    torch.save({"v": value}, tmp_path / "f.pth")
    read = torch_files.load(tmp_path / "f.pth")["v"]
    assert (read, type(read)) == (value.item(), type(value.item()))


def test_a_big_endian_number(tmp_path):
    torch.save({"v": np.dtype(">f8").type(1.5), "w": np.array([258], ">i2")[0]}, tmp_path / "f.pth")
    assert torch_files.load(tmp_path / "f.pth") == {"v": 1.5, "w": 258}


class Scripted(torch.nn.Module):
    """Its archive writes a file when torch.jit.load opens it."""

    def __init__(self, trap: str = ""):
        super().__init__()
        self.inner = torch.nn.Linear(3, 2)
        self.trap = trap

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x)

    @torch.jit.export
    def __getstate__(self):
        return (self.trap, self.training)

    @torch.jit.export
    def __setstate__(self, state: tuple[str, bool]):
        self.inner = torch.nn.Linear(3, 2)
        self.trap = state[0]
        self.training = state[1]
        torch.save(torch.ones(1), self.trap)


def test_a_torchscript_archive_is_read_as_tensors_and_never_run(tmp_path):
    module = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    torch.jit.script(module).save(tmp_path / "script.pt")
    read = weight_files.load_file(tmp_path / "script.pt")
    wanted = module.state_dict()
    assert read.keys() == wanted.keys()
    assert all(torch.equal(read[key], value) for key, value in wanted.items())


def test_a_torchscript_archive_with_its_own_state_is_refused(tmp_path):
    """Hand-made: as torch.jit.save writes a module with __setstate__, its state is no
    dictionary of attributes.
    """
    torch.jit.script(torch.nn.Linear(3, 2)).save(tmp_path / "script.pt")
    program = b"\x80\x02c__torch__.Evil\nEvil\n)\x81X\x05\x00\x00\x00/tmp/\x88\x86b."
    repack(tmp_path / "script.pt", lambda name, content: program if name.endswith("/data.pkl") else content)
    assert "TorchScript archive" in (said := refusal(tmp_path / "script.pt"))
    assert "state_dict()" in said


# ── code ──


@pytest.mark.parametrize("form", ["new", "old", "pickle"])
@pytest.mark.parametrize("function", [os.mkdir, eval, exec, getattr, __import__])
def test_nothing_is_called(tmp_path, form, function):
    trap = tmp_path / "trap"
    arguments = {os.mkdir: (str(trap),), getattr: (1, "real"), __import__: ("this",)}.get(
        function, (f"open({str(trap)!r}, 'w')",)
    )
    content = {"model": WEIGHTS, "x": Call(function, *arguments)}
    if form == "pickle":
        (tmp_path / "f.pth").write_bytes(pickle.dumps(content))
    else:
        torch.save(content, tmp_path / "f.pth", _use_new_zipfile_serialization=form == "new")
    assert "hold" in refusal(tmp_path / "f.pth") or form == "pickle"
    assert not trap.exists()


HOSTILE_NUMPY = {
    "an array": np.arange(3.0),
    "a dtype of objects": Call(np.dtype, "O8", False, True),
    "a dtype of bytes": np.dtype("S8"),
    "a dtype with fields": np.dtype([("a", "f4")]),
    "a scalar of objects": Call(np.float64(0).__reduce__()[0], np.dtype("O"), b"\0" * 8),
    "a scalar too long": Call(np.float64(0).__reduce__()[0], np.dtype("f8"), b"\0" * 800),
    "a dtype with a state of addresses": Call(
        np.dtype, "f8", False, True, state=(3, "<", None, ("a",), {"a": 1}, 1 << 40, 1, 0)
    ),
}


@pytest.mark.parametrize("what", HOSTILE_NUMPY)
def test_of_numpy_numbers_alone(tmp_path, what):
    torch.save({"model": WEIGHTS, "x": HOSTILE_NUMPY[what]}, tmp_path / "f.pth")
    refusal(tmp_path / "f.pth")


def test_torch_load_is_called_nowhere():
    """benchmarks/worker.py reads what benchmark.py wrote a moment before."""
    banned = {
        ("torch", "load"),
        ("jit", "load"),
        ("pickle", "load"),
        ("pickle", "loads"),
        ("pickle", "Unpickler"),
        ("joblib", "load"),
        ("dill", "load"),
        ("hub", "load"),
        ("hub", "load_state_dict_from_url"),
    }
    for path in all_files():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.value, (ast.Name, ast.Attribute)):
                owner = node.value.id if isinstance(node.value, ast.Name) else node.value.attr
                if (
                    (owner, node.attr) in banned
                    and path.name != "worker.py"
                    and path.parent.name != "fuzzing"
                ):
                    raise AssertionError(f"{path.name}:{node.lineno} calls {owner}.{node.attr}")


# ── tensors that are none ──


def odd_tensors():
    yield "on the meta device", torch.empty(3, device="meta")
    yield "sparse", torch.eye(3).to_sparse()
    yield "sparse", torch.eye(3).to_sparse_csr()
    yield "quantized", torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)
    yield "share memory", torch.zeros(1).expand(1_000_000)
    yield "share memory", torch.zeros(10).as_strided((4, 4), (1, 1))
    yield "complex", torch.ones(2, dtype=torch.complex64)


@pytest.mark.parametrize(("word", "tensor"), odd_tensors())
def test_tensors_that_are_no_plain_ones(tmp_path, word, tensor):
    torch.save({"model": {**WEIGHTS, "x": tensor}}, tmp_path / "f.pth")
    assert word in refusal(tmp_path / "f.pth")


def tensor_program(size, stride, offset=0, elements=4, key=b"0", storage=b"FloatStorage"):
    """The pickle of {"w": a tensor of these numbers}."""
    number = lambda n: b"\x8a\x08" + struct.pack("<q", n)  # noqa: E731
    numbers = lambda each: b"(" + b"".join(map(number, each)) + b"t"  # noqa: E731
    text = lambda t: b"X" + struct.pack("<I", len(t)) + t  # noqa: E731
    persistent = (
        b"("
        + text(b"storage")
        + b"ctorch\n"
        + storage
        + b"\n"
        + text(key)
        + text(b"cpu")
        + number(elements)
        + b"tQ"
    )
    head = b"\x80\x02}" + text(b"w") + b"ctorch._utils\n_rebuild_tensor_v2\n("
    return head + persistent + number(offset) + numbers(size) + numbers(stride) + b"\x89}tRs."


def test_the_program_of_a_tensor_is_one(tmp_path):
    read = weight_files.load_state_dict(with_pickle(tmp_path / "f.pth", tensor_program((2, 2), (2, 1))))
    assert torch.equal(read["w"], torch.zeros(2, 2))


@pytest.mark.parametrize(
    "wrong",
    [
        {"size": (5,)}, {"size": (2,), "stride": (4,)}, {"size": (2,), "offset": 3}, {"size": (-1,)},
        {"stride": (-1,)}, {"offset": -1}, {"elements": 10**12}, {"elements": -1}, {"key": b"1"},
        {"key": b"../../version"}, {"size": (2**61,)}, {"stride": (1, 1)},
        {"size": (4,) * 70, "stride": (1,) * 70},
        {"storage": b"QInt8Storage"}, {"storage": b"DoubleStorage"},
    ],
)  # fmt: skip
def test_tensors_outside_their_storage(tmp_path, wrong):
    refusal(with_pickle(tmp_path / "f.pth", tensor_program(**{"size": (4,), "stride": (1,), **wrong})))
