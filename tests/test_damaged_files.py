"""Weight files that are damaged, odd or endless: refused by name within seconds; and
which checkpoint a run goes on from.
"""

import io
import os
import struct
import zipfile

import pytest
import torch
from odd_files import WEIGHTS, refusal, repack, with_pickle

from checkpoint_io import checkpoints, resumption, weight_files
from errors import UserError

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


SECONDS = ("nested tuples as a key", "doubled sixty times", "many steps")


@pytest.mark.parametrize(
    "what", [pytest.param(what, marks=pytest.mark.slow) if what in SECONDS else what for what in BOMBS]
)
def test_programs_that_build_nothing_sensible(tmp_path, what):
    refusal(with_pickle(tmp_path / "f.pth", BOMBS[what]))


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
        assert f"blocks.0.gamma_2 is not a tensor but of type {type(value).__name__}" in refusal(
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
    assert "not a regular file" in refusal(tmp_path / "fifo.pth")
    assert "not a regular file" in refusal(tmp_path)
    assert "no such file" in refusal(tmp_path / "none.pth")
    os.mkfifo(tmp_path / "checkpoint.pth")
    with pytest.raises(UserError, match=r"checkpoint\.pth is not a regular file"):
        resumption.find_newest_intact(tmp_path)


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
