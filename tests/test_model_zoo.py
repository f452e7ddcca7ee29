"""The model zoo on a server of its own: downloads, broken and wrong ones, and files that must not be trusted."""

from __future__ import annotations

import argparse
import collections
import dataclasses
import hashlib
import http.server
import os
import pathlib
import random
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from many_processes import free_port
from refusals import refused
from source_files import ROOT
from tiny_runs import RunsCode

import model_zoo
import modeling_dvae
import modeling_finetune
import modeling_pretrain
import modeling_vqkd
from checkpoint_io import checksums, downloads, published, weight_files
from checkpoint_io.pickle_builders import PickledObject
from errors import UserError

pytestmark = pytest.mark.usefixtures("hub")

BODY = random.Random(1).randbytes(3_000_000)
HASH = hashlib.sha256(BODY).hexdigest()[:8]
assert re.search("[a-f]", HASH)  # else no name could carry it


class Server(http.server.ThreadingHTTPServer):
    """Serves BODY, or what `bodies` has for a path, under every path that ends in .pth;
    `break_after`: after how many bytes each answer breaks off.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.requests: list[tuple[str, str | None]] = []  # path, Range
        self.bodies: dict[str, bytes] = {}
        self.break_after: list[int] = []
        self.ranges = True
        self.etag = '"1"'
        self.pause = 0.0  # seconds before the body
        self.url = f"http://127.0.0.1:{self.server_port}/"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        asked = self.headers.get("Range")
        self.server.requests.append((self.path, asked))
        if not self.path.split("?")[0].endswith(".pth"):
            self.send_error(404)
            return
        body = self.server.bodies.get(self.path, BODY)
        unchanged = self.headers.get("If-Range") in (None, self.server.etag)
        start = (
            int(asked.removeprefix("bytes=").rstrip("-")) if asked and self.server.ranges and unchanged else 0
        )
        if start >= len(body):
            self.send_error(416)
            return
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(body) - start))
        self.send_header("ETag", self.server.etag)
        self.end_headers()
        time.sleep(self.server.pause)
        end = start + self.server.break_after.pop(0) if self.server.break_after else len(body)
        self.wfile.write(body[start:end])

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield server
        server.shutdown()


def test_table_names_files_builders_and_results() -> None:
    entry = published.ENTRIES["beitv2_base_patch16_224_pt1k"]
    assert entry.urls == [published.MIRRORS[0] + "BEiT-v2/beitv2_base_patch16_224_pt1k.pth"]
    assert (entry.kind, entry.model) == ("pretrained", "beit_base_patch16_224_8k_vocab_cls_pt")
    entry = published.ENTRIES["beit_base_patch16_384_pt22k_ft22kto1k"]
    assert (entry.file, entry.model) == (
        "v1.0/beit_base_patch16_384_pt22k_ft22kto1k.pth",
        "beit_base_patch16_384",
    )
    assert (entry.classes, dict(entry.metrics)) == (1000, {"top1": 86.82, "top5": 98.124, "loss": 0.565})
    entry = published.ENTRIES["vqkd_encoder_base_decoder_3x768x12_clip"]
    assert entry.urls[0].endswith("/BEiT-v2/vqkd_encoder_base_decoder_3x768x12_clip-d5036aa7.pth")
    assert entry.sha256_prefix == "d5036aa7"
    assert len(published.ENTRIES) == 30


def test_main_prints_the_table_and_knows_its_names(capsys: pytest.CaptureFixture[str]) -> None:
    model_zoo.main([])
    out = capsys.readouterr().out
    assert "top1 85.5" in out
    assert all(name in out for name in published.ENTRIES)
    assert "beitv2_base_patch16_224_pt1k" in refused(model_zoo.main, ["beitv2_base_patch16_224_pt1"], capsys)


def test_the_table_shows_what_is_on_this_disk(hub: pathlib.Path) -> None:
    hub.mkdir(parents=True)
    (hub / "beit_base_patch16_224_pt22k.pth").write_bytes(bytes(3 * 2**20))
    row = next(
        line for line in model_zoo.format_table().splitlines() if "beit_base_patch16_224_pt22k " in line
    )
    assert row.split() == ["beit_base_patch16_224_pt22k", "92.0", "M", "~351", "MiB", "3", "MiB", "-"]


def test_the_table_shows_about_how_much_is_downloaded() -> None:
    rows = {line.split()[0]: line for line in model_zoo.format_table().splitlines() if line.startswith("  ")}
    assert " ~330 MiB " in rows["beitv2_base_patch16_224_pt1k_ft1k"]  # 86.5 M x 4 bytes
    assert " ~205 MiB " in rows["dall_e_encoder"]  # as OpenAI's file is
    assert " ~1.1 GiB " in rows["beitv2_large_patch16_224_pt1k_ft1k"]
    assert "~" not in rows["beitv2_base_patch16_224_pt1k_ftade20k"]


@pytest.mark.slow
def test_the_parameter_counts_are_those_of_the_models() -> None:
    positions = {"use_abs_pos_emb": False, "init_values": 0.1}
    for name, entry in published.ENTRIES.items():
        with torch.device("meta"):
            if entry.kind == "tokenizer":
                model = modeling_vqkd.create_model(name, as_tokenizer=True)
            elif entry.kind == "pretrained":
                layers = {"early_layers": 9 if "base" in name else 21}
                model = modeling_pretrain.create_model(
                    entry.model, use_shared_rel_pos_bias=True, **positions, **layers
                )
            elif entry.kind == "tokenizer-v1":
                model = modeling_dvae.DallEEncoder()
            elif entry.kind in ("intermediate", "finetuned"):
                own = {"use_rel_pos_bias": True, "num_classes": entry.classes}
                model = modeling_finetune.create_model(entry.model, **positions, **own)
            else:
                continue
        assert entry.params == round(sum(p.numel() for p in model.parameters()) / 1e6, 1), name


# -------------------------------------------------------------------------------------------------------------
#   fetching
def test_download_once_under_the_name_without_query(server: Server, hub: pathlib.Path) -> None:
    path = downloads.fetch(f"{server.url}some/weights-{HASH}.pth?sv=1&sig=abc%3D")
    assert path == hub / f"weights-{HASH}.pth"
    assert path.read_bytes() == BODY
    assert downloads.fetch(f"{server.url}some/weights-{HASH}.pth?sv=1&sig={'other' * 100}") == path
    assert [request for request, _ in server.requests] == [f"/some/weights-{HASH}.pth?sv=1&sig=abc%3D"]
    assert {p.name for p in hub.iterdir()} == {path.name, path.name + ".checked"}  # no .part, no .lock


def test_one_file_name_at_two_addresses_is_two_files(server: Server, hub: pathlib.Path) -> None:
    server.bodies = {
        "/a/checkpoint-best.pth": b"A",
        "/b/checkpoint-best.pth": b"B",
        "/b/checkpoint-best.pth?run=2": b"C",
    }
    files = {path: downloads.fetch(server.url.rstrip("/") + path) for path in server.bodies}
    assert {path: file.read_bytes() for path, file in files.items()} == server.bodies
    assert all(file.name == "checkpoint-best.pth" and file.parent.parent == hub for file in files.values())
    signed = [downloads.fetch(f"{server.url}a/checkpoint-best.pth?se=2&sig={i}") for i in range(2)]
    assert signed[0] == signed[1]
    assert len(server.requests) == 4


def test_known_files_lie_where_torch_hub_puts_them(server: Server, hub: pathlib.Path) -> None:
    hub.mkdir(parents=True)
    published = "beit_base_patch16_224_pt22k.pth"
    plain = {
        f"https://github.com/addf400/files/releases/download/v1.0/{published}": published,
        f"https://unilm.blob.core.windows.net/x/{published}?sv=1&sig=2": published,
        "https://cdn.openai.com/dall-e/encoder.pkl": "encoder.pkl",
        "dall_e_encoder": "encoder.pkl",
        f"https://example.com/w-{HASH}.pth": f"w-{HASH}.pth",
    }
    for source, name in plain.items():
        (hub / name).write_bytes(BODY)
        assert downloads.fetch(source) == hub / name
    downloads.fetch(server.url + published)  # somebody's: must not pass for the published one
    assert len(server.requests) == 1


def test_a_file_put_into_the_cache_by_hand_is_checked(
    hub: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.mkdir(parents=True)
    name = "vqkd_encoder_base_decoder_1x768x12_clip"
    path = hub / f"{name}-d93179da.pth"
    path.write_text("garbage")
    for _ in range(2):  # the note beside it makes no difference
        with pytest.raises(
            UserError,
            match=(r"-d93179da\.pth has sha256 [0-9a-f]{8}\.\.\. instead of " r"d93179da: .*delete it"),
        ):
            downloads.fetch(name)
    assert path.read_text() == "garbage"  # not ours to delete
    path.write_bytes(BODY)  # the right file, in the place of the wrong one
    monkeypatch.setitem(
        published.ENTRIES, name, dataclasses.replace(published.ENTRIES[name], sha256_prefix=HASH)
    )
    assert downloads.fetch(name) == path


def test_a_cached_file_is_read_for_its_hash_once(
    server: Server, hub: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed = []
    digest = checksums.hash_file
    monkeypatch.setattr(checksums, "hash_file", lambda path: [hashed.append(path.name), digest(path)][1])
    hub.mkdir(parents=True)
    (hub / f"by-hand-{HASH}.pth").write_bytes(BODY)
    for _ in range(3):
        path = downloads.fetch(f"{server.url}by-hand-{HASH}.pth")
        downloads.fetch(f"{server.url}w-{HASH}.pth")
    assert hashed == [path.name, f"w-{HASH}.pth.part"]
    os.utime(path, ns=(1, 1))
    downloads.fetch(f"{server.url}by-hand-{HASH}.pth")
    (hub / f"{path.name}.checked").write_text("cut sh")
    downloads.fetch(f"{server.url}by-hand-{HASH}.pth")
    assert hashed[2:] == [path.name] * 2


@pytest.mark.parametrize("ranges", [True, False], ids=["server resumes", "server starts anew"])
def test_download_that_breaks_off_is_resumed(server: Server, hub: pathlib.Path, ranges: bool) -> None:
    server.ranges, server.break_after = ranges, [2_000_000]
    assert downloads.fetch(f"{server.url}w-{HASH}.pth").read_bytes() == BODY
    assert server.requests[1][1] == "bytes=2000000-"


def test_partial_file_of_an_earlier_run_is_resumed(server: Server, hub: pathlib.Path) -> None:
    server.break_after = [1_000_000, 0]
    with pytest.raises(UserError, match=r"broke off.*run again"):
        downloads.fetch(f"{server.url}w.pth")
    (part,) = hub.glob("*/w.pth.part")
    assert part.stat().st_size == 1_000_000
    assert downloads.fetch(f"{server.url}w.pth").read_bytes() == BODY
    assert [asked for _, asked in server.requests][2:] == ["bytes=1000000-"]


@pytest.mark.parametrize("changed", ["file", "address"])
def test_partial_file_of_another_file_is_not_mixed_in(
    server: Server, hub: pathlib.Path, changed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(published, "MIRRORS", [server.url + "one/"])
    server.break_after = [1_000_000, 0]
    with pytest.raises(UserError):
        downloads.fetch("beit_base_patch16_224_pt22k")
    (part,) = hub.glob("*.part")
    part.write_bytes(b"?" * 1_000_000)  # what the earlier version held
    server.etag = '"2"' if changed == "file" else '"1"'
    monkeypatch.setattr(published, "MIRRORS", [server.url + ("one/" if changed == "file" else "two/")])
    assert downloads.fetch("beit_base_patch16_224_pt22k").read_bytes() == BODY


def test_partial_file_that_is_already_whole(server: Server, hub: pathlib.Path) -> None:
    hub.mkdir(parents=True)
    (hub / f"w-{HASH}.pth.part").write_bytes(BODY)
    assert downloads.fetch(f"{server.url}w-{HASH}.pth").read_bytes() == BODY
    assert [asked for _, asked in server.requests] == [f"bytes={len(BODY)}-", None]


def test_wrong_hash_is_refused_and_deleted(server: Server, hub: pathlib.Path) -> None:
    with pytest.raises(UserError, match="instead of 0123abcd and was deleted"):
        downloads.fetch(f"{server.url}w.pth", "0123abcd")
    assert not [p for p in hub.rglob("*") if p.is_file() and p.suffix != ".lock"]


def test_a_hash_that_only_the_name_tells_deletes_nothing(server: Server, hub: pathlib.Path) -> None:
    with pytest.raises(
        UserError, match=(r"instead of 0123abcd, as in its name; .*kept as " r".*/unchecked_w-0123abcd\.pth")
    ):
        downloads.fetch(f"{server.url}w-0123abcd.pth")
    assert downloads.fetch(hub / "unchecked_w-0123abcd.pth").read_bytes() == BODY
    (hub / "w-0123abcd.pth").write_bytes(BODY)
    with pytest.raises(UserError, match="give its path instead"):
        downloads.fetch(f"{server.url}w-0123abcd.pth")
    assert downloads.fetch(hub / "w-0123abcd.pth").read_bytes() == BODY


@pytest.mark.parametrize("name", ["m-1234567890.pth", "w-20240131.pth", "w-19991231.pth"])
def test_a_number_in_a_name_is_no_hash(server: Server, name: str) -> None:
    assert downloads.fetch(server.url + name).read_bytes() == BODY


def test_mirrors_are_tried_in_turn(
    server: Server, hub: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(published, "MIRRORS", [f"http://127.0.0.1:{free_port()}/", server.url])
    assert downloads.fetch("beit_base_patch16_224_pt22k") == hub / "beit_base_patch16_224_pt22k.pth"
    monkeypatch.setattr(published, "FORMER_HOSTS", ("localhost",))
    dead = f"http://localhost:{free_port()}/x/beitv2_base_patch16_224_pt1k.pth?sv=1&sig=2"
    assert downloads.fetch(dead) == hub / "beitv2_base_patch16_224_pt1k.pth"


def test_the_users_mirrors_come_first(
    server: Server, hub: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "copies"
    (folder / "BEiT-v2").mkdir(parents=True)
    name = "beitv2_base_patch16_224_pt1k"
    (folder / "BEiT-v2" / f"{name}.pth").write_bytes(b"in the published folder")
    (folder / "beit_base_patch16_224_pt22k.pth").write_bytes(b"bare")
    monkeypatch.setattr(published, "MIRRORS", [f"{server.url}published/"])
    monkeypatch.setenv(
        "BEIT_MIRRORS", f"http://127.0.0.1:{free_port()} {folder.as_uri()} {server.url}mirror/"
    )
    assert downloads.fetch(name).read_bytes() == b"in the published folder"
    assert downloads.fetch("beit_base_patch16_224_pt22k").read_bytes() == b"bare"
    assert not server.requests
    downloads.fetch("beit_base_patch16_224_pt22k_ft1k")
    assert [path for path, _ in server.requests] == ["/mirror/v1.0/beit_base_patch16_224_pt22k_ft1k.pth"]
    assert not list(hub.glob("*.part*"))
    (folder / "encoder.pkl").write_bytes(b"DALL-E")
    assert downloads.fetch("dall_e_encoder") == hub / "encoder.pkl"


def test_a_mirror_with_another_file_is_passed_over(
    server: Server, hub: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "vqkd_encoder_base_decoder_1x768x12_clip"
    monkeypatch.setitem(
        published.ENTRIES, name, dataclasses.replace(published.ENTRIES[name], sha256_prefix=HASH)
    )
    monkeypatch.setattr(published, "MIRRORS", [server.url])
    monkeypatch.setenv("BEIT_MIRRORS", f"{server.url}login")
    server.bodies = {f"/login/{part}{name}-d93179da.pth": b"<html>" for part in ("BEiT-v2/", "")}
    assert downloads.fetch(name).read_bytes() == BODY
    assert len(server.requests) == 3


def test_unreachable_mirrors_are_all_named(hub: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    port = free_port()
    monkeypatch.setattr(published, "MIRRORS", [f"http://127.0.0.1:{port}/published/"])
    monkeypatch.setenv("BEIT_MIRRORS", f"http://127.0.0.1:{port}/mirror")
    with pytest.raises(
        UserError,
        match=(r"/mirror/v1\.0/beit.* nor .*/mirror/beit.* nor " r".*/published/v1\.0/beit.*put it at"),
    ):
        downloads.fetch("beit_base_patch16_224_pt22k")


@pytest.mark.parametrize("base", ["/data/beit", "https://example.com/x?sig=1", "http://example.com/"])
def test_what_cannot_be_a_mirror_is_refused(base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BEIT_MIRRORS", base)
    with pytest.raises(UserError, match=f"{re.escape(base.partition('?')[0])}.*https://"):
        downloads.fetch("beit_base_patch16_224_pt22k")


def test_unreachable_says_what_and_where_to_put_it(hub: pathlib.Path) -> None:
    url = f"http://127.0.0.1:{free_port()}/w.pth"
    with pytest.raises(UserError) as error:
        downloads.fetch(url)
    assert url in str(error.value)
    place = pathlib.Path(re.findall(r"put it at (\S+)", str(error.value))[0])
    assert place.is_relative_to(hub)
    place.write_bytes(BODY)
    assert downloads.fetch(url) == place


def test_missing_on_the_server(server: Server) -> None:
    with pytest.raises(UserError, match=r"nothing\.bin \(HTTP Error 404"):
        downloads.fetch(f"{server.url}nothing.bin")
    assert len(server.requests) == 1


def test_url_cut_by_the_shell() -> None:
    with pytest.raises(UserError, match="quotes"):
        downloads.fetch("https://conversationhub.blob.core.windows.net/beit-share-public/w.pth?sv=2021-10-04")


@pytest.mark.parametrize("url", ["http://example.com/w.pth", "ftp://example.com/w.pth"])
def test_unsafe_urls_are_refused(url: str) -> None:
    with pytest.raises(UserError, match="https://"):
        downloads.fetch(url)


def test_paths_and_file_urls_are_used_in_place(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "a weight.pth"
    path.write_bytes(BODY)
    assert downloads.fetch(str(path), HASH) == path
    assert downloads.fetch(path.as_uri()) == path
    with pytest.raises(UserError, match="instead of 00000000"):
        downloads.fetch(str(path), "00000000")
    assert path.exists()
    for wrong in (tmp_path.as_uri(), (tmp_path / "none.pth").as_uri()):
        with pytest.raises(UserError, match="no such file"):
            downloads.fetch(wrong)
    with pytest.raises(UserError, match="folder"):
        downloads.fetch(str(tmp_path))


def test_mistyped_source_offers_names() -> None:
    with pytest.raises(UserError, match="beitv2_base_patch16_224_pt1k "):
        downloads.fetch("weights/beitv2_base_patch16_224_pt_1k.pth")
    with pytest.raises(UserError, match=r"nowhere/x\.pth is neither .* `python model_zoo\.py`"):
        downloads.fetch("nowhere/x.pth")


@pytest.mark.slow
def test_two_processes_download_once(server: Server, hub: pathlib.Path) -> None:
    server.pause = 1.0
    code = f"from checkpoint_io import downloads; print(downloads.fetch('{server.url}w-{HASH}.pth'))"
    ranks = [
        subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    assert [rank.communicate(timeout=60)[0].strip() for rank in ranks] == [str(hub / f"w-{HASH}.pth")] * 2
    assert len(server.requests) == 1


# --------------------------------------------------------------------------------------------------------------
#   reading
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
    with pytest.raises(UserError, match=f"{path.name} is no weight file or an incomplete one"):
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
        with pytest.raises(UserError, match=r"holds no weights|is no tensor but of type int"):
            load(empty)
