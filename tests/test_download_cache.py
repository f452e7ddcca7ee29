"""Downloads: where files lie, resumed and checked, mirrors, and what is told when there
is none.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
import re
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest
from file_server import BODY, HASH, Server
from many_processes import free_port
from source_files import ROOT

from checkpoint_io import checksums, downloads, published
from errors import UserError

pytestmark = pytest.mark.usefixtures("hub")


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield server
        server.shutdown()


# ── fetching ──
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
