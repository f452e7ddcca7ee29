"""Weight files from strangers: read as torch.load reads them, or refused by name; nothing in them runs."""

import ast
import io
import os
import pickle
import struct
import time
import zipfile
from collections import Counter, OrderedDict, defaultdict

import numpy as np
import pytest
import torch
from source_files import all_files

from checkpoint_io import checkpoints, resumption, torch_files, weight_files
from errors import UserError

WEIGHTS = {"a.weight": torch.arange(6.0).view(2, 3), "a.bias": torch.ones(2, dtype=torch.bfloat16)}


class Call:
    """Pickled as a call of `function` with `arguments`."""

    def __init__(self, function, *arguments, state=None):
        self.call = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self):
        return self.call


def repack(path, change=lambda name, content: content, **how):
    """The zip archive at `path` written again, its parts changed."""
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", **how) as archive:
        for name, content in parts.items():
            archive.writestr(name, change(name, content))


def with_pickle(path, program):
    """A file of torch.save whose pickle is `program`, with one storage of 4 floats beside it."""
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
            transposed=base.t(), part=base[2:5, 1:4], scalar=torch.tensor(3.5), empty=torch.empty(0, 7),
            parameter=torch.nn.Parameter(base.clone()), whole=base, bf16=base.bfloat16(),
        ),
        "optimizer": {"state": {0: {"step": torch.tensor(7.0)}}, "param_groups": [{"betas": (0.9, 0.98), "params": [0]}]},
        "epoch": 3, "note": "ü", "raw": b"\x00\xff", "none": None, "set": {1, 2}, "big": 10**30, "size": base.shape,
        "count": Counter("aab"), "default": defaultdict(list, {"k": [1]}), "dtype": torch.float16, "on": [True, 0.1],
    }  # fmt: skip
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
    """Hand-made: as torch.jit.save writes a module with __setstate__, its state is no dictionary of attributes."""
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
    banned = {("torch", "load"), ("jit", "load"), ("pickle", "load"), ("pickle", "loads"), ("pickle", "Unpickler"),
              ("joblib", "load"), ("dill", "load"), ("hub", "load"), ("hub", "load_state_dict_from_url")}  # fmt: skip
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
        {"size": (5,)}, {"size": (2,), "stride": (4,)}, {"size": (2,), "offset": 3}, {"size": (-1,)}, {"stride": (-1,)},
        {"offset": -1}, {"elements": 10**12}, {"elements": -1}, {"key": b"1"}, {"key": b"../../version"}, {"size": (2**61,)},
        {"stride": (1, 1)}, {"size": (4,) * 70, "stride": (1,) * 70},
        {"storage": b"QInt8Storage"}, {"storage": b"DoubleStorage"},
    ],
)  # fmt: skip
def test_tensors_outside_their_storage(tmp_path, wrong):
    refusal(with_pickle(tmp_path / "f.pth", tensor_program(**{"size": (4,), "stride": (1,), **wrong})))


# ── programs without end ──

BOMBS = {
    "nested lists": b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".",
    "nested tuples": b"\x80\x02)" + b"\x85" * 100_000 + b".",
    "nested tuples as a key": b"\x80\x02}(" + b")" + b"\x85" * 1_000_000 + b"Nu.",
    "a list in itself": b"\x80\x02]q\x00h\x00a.",
    "doubled sixty times": b"\x80\x02]q\x00"
    + b"".join(b"](h%ch%ceq%c" % (i, i, i + 1) for i in range(60))
    + b".",
    "many steps": b"\x80\x02" + b"N0" * 4_000_000 + b"}.",
    "copies of copies": b"\x80\x02]("
    + b"N" * 100_000
    + b"eq\x00("
    + b"ctorch\nSize\nh\x00\x85R0" * 1000
    + b"t}.",
    "a text longer than the file": b"\x80\x02X\xff\xff\xff\x7f.",
    "no end": b"\x80\x02}",
    "nothing on the stack": b"\x80\x020000.",
    "a memo of nothing": b"\x80\x02h\x07.",
    "extensions": b"\x80\x02\x82\x01.",
    "persistent text": b"\x80\x02Pabc\n.",
    "a wrong opcode": b"\x80\x02\xff\xfe.",
    "not a pickle": b"hello",
    "nothing": b"",
    "an instruction of the oldest kind": b"(S'/tmp/x'\nios\nsystem\n.",
}


@pytest.mark.parametrize("what", BOMBS)
def test_programs_that_build_nothing_sensible(tmp_path, what):
    refusal(with_pickle(tmp_path / "f.pth", BOMBS[what]))


# ── damage ──


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_recompressed_file_is_the_same(tmp_path, method):
    torch.save({"model": WEIGHTS}, tmp_path / "f.pth")
    repack(tmp_path / "f.pth", compression=method)
    assert all(
        torch.equal(v, WEIGHTS[k]) for k, v in weight_files.load_state_dict(tmp_path / "f.pth").items()
    )


def test_a_flipped_bit_is_found(tmp_path):
    torch.save({"model": {"w": torch.full((1000,), 1.0)}, "optimizer": {}, "epoch": 0}, tmp_path / "f.pth")
    content = bytearray((tmp_path / "f.pth").read_bytes())
    content[content.index(struct.pack("<f", 1.0) * 100) + 402] ^= 1
    (tmp_path / "f.pth").write_bytes(content)
    # nobody else sees it
    assert torch.load(tmp_path / "f.pth", weights_only=True)["model"]["w"].sum() != 1000
    assert "CRC" in refusal(tmp_path / "f.pth")
    with pytest.raises(UserError, match="CRC"):
        checkpoints.read_checkpoint(tmp_path / "f.pth")


@pytest.mark.parametrize("new_format", [True, False])
def test_a_file_cut_off_anywhere(tmp_path, new_format):
    torch.save({"model": WEIGHTS}, tmp_path / "f.pth", _use_new_zipfile_serialization=new_format)
    content = (tmp_path / "f.pth").read_bytes()
    for length in [*range(0, len(content), 37), len(content) - 1]:
        (tmp_path / "f.pth").write_bytes(content[:length])
        refusal(tmp_path / "f.pth")


def test_archives_that_are_odd(tmp_path):
    path = tmp_path / "f.pth"
    torch.save({"model": WEIGHTS}, path)
    whole = path.read_bytes()
    encrypted = bytearray(whole)
    for signature, at in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        position = -1
        while (position := encrypted.find(signature, position + 1)) >= 0:
            encrypted[position + at] |= 1
    path.write_bytes(encrypted)
    assert "encrypted" in refusal(path)
    path.write_bytes(whole)
    repack(
        path,
        lambda name, content: bytes(2**28) if name.endswith("data/0") else content,
        compression=zipfile.ZIP_DEFLATED,
    )
    assert "data/0 has 268,435,456 bytes instead of 24" in refusal(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("word/document.xml", "<w/>")
    assert "word/document.xml" in refusal(path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(tmp_path, value):
    for file in ("f.pth", "f.safetensors"):
        weights = {**WEIGHTS, "b.weight": torch.tensor([1.0, value])}
        if file.endswith("pth"):
            torch.save({"model": weights}, tmp_path / file)
        else:
            from safetensors.torch import save_file

            save_file(weights, tmp_path / file)
        assert "b.weight holds 1 value that is not finite (of 2)" in refusal(tmp_path / file)
    torch.save(
        {"w": torch.ones(3).to(torch.float8_e4m3fn), "none": torch.empty(0)}, tmp_path / "eight_bits.pth"
    )
    weight_files.load_state_dict(tmp_path / "eight_bits.pth")
    torch.save({"model": {**WEIGHTS, "attn_mask": torch.tensor([0, -torch.inf])}}, tmp_path / "clip.pth")
    weight_files.load_state_dict(tmp_path / "clip.pth")


@pytest.mark.parametrize("value", ["text", None, 1.0, [1.0]])
def test_a_weight_that_is_no_tensor_is_named(tmp_path, value):
    spoiled = {**WEIGHTS, "blocks.0.gamma_2": value}
    for content in (spoiled, {"model": spoiled}, {"epoch": 3, "state_dict": spoiled}):
        torch.save(content, tmp_path / "f.pth")
        assert f"blocks.0.gamma_2 is no tensor but of type {type(value).__name__}" in refusal(
            tmp_path / "f.pth"
        )
    # plain entries beside bare weights
    torch.save({**WEIGHTS, "epoch": 3, "arch": "ViT-B"}, tmp_path / "f.pth")
    assert set(weight_files.load_state_dict(tmp_path / "f.pth")) == set(WEIGHTS)


def test_safetensors_whose_head_is_deep_json(tmp_path):
    from safetensors.torch import save_file

    save_file(WEIGHTS, tmp_path / "f.safetensors", {"args": '{"a":' + "[" * 100_000})
    with pytest.raises(UserError, match="its head is no JSON"):
        checkpoints.read_checkpoint(tmp_path / "f.safetensors")
    deep = b'{"a":' + b"[" * 100_000
    (tmp_path / "g.safetensors").write_bytes(struct.pack("<Q", len(deep)) + deep + bytes(9))
    refusal(tmp_path / "g.safetensors")


def test_safetensors_by_another_name(tmp_path):
    from safetensors.torch import save_file

    save_file(WEIGHTS, tmp_path / "f.pth")
    assert weight_files.load_state_dict(tmp_path / "f.pth").keys() == WEIGHTS.keys()
    torch.save(WEIGHTS, tmp_path / "f.safetensors")
    assert checkpoints.read_checkpoint(tmp_path / "f.safetensors")["model"].keys() == WEIGHTS.keys()


def test_what_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "fifo.pth")
    assert "no regular file" in refusal(tmp_path / "fifo.pth")
    assert "no regular file" in refusal(tmp_path)
    assert "no such file" in refusal(tmp_path / "none.pth")
    os.mkfifo(tmp_path / "checkpoint.pth")
    with pytest.raises(UserError, match=r"checkpoint\.pth is no regular file"):
        resumption.find_newest_intact(tmp_path)


# ── which checkpoint a run goes on from ──


def test_the_fallback_is_the_newest_by_step(tmp_path):
    for name, step in (("checkpoint-step30.pth", 30), ("checkpoint-0.pth", 20), ("checkpoint-best.pth", 10)):
        torch.save({"model": WEIGHTS, "next": {"epoch": 1, "samples": 0, "step": step}}, tmp_path / name)
        os.utime(tmp_path / name, (2e9 - step, 2e9 - step))  # the newest file is the oldest step
    (tmp_path / "checkpoint.pth").write_bytes(b"cut off")
    assert resumption.find_newest_intact(tmp_path) == tmp_path / "checkpoint-step30.pth"


def test_a_checkpoint_that_may_not_be_read_is_not_called_damaged(tmp_path, monkeypatch):
    torch.save({"model": WEIGHTS}, tmp_path / "checkpoint.pth")
    (tmp_path / "checkpoint.pth").chmod(0)
    if os.getuid() == 0:  # root may read everything

        def refuse(*_, **__):
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(io, "open", refuse)
        monkeypatch.setattr("builtins.open", refuse)
    for read in (
        resumption.find_newest_intact,
        lambda folder: checkpoints.read_checkpoint(folder / "checkpoint.pth"),
    ):
        with pytest.raises(
            UserError,
            match=(r"checkpoint\.pth cannot be read: Permission denied; " r"change its permissions"),
        ):
            read(tmp_path)
