"""Download a file over HTTP: resumed where it broke off, never endlessly, never a part
for the whole.
"""

from __future__ import annotations

import contextlib
import errno
import http.client
import logging
import os
import pathlib
import queue
import re
import shutil
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from tqdm import tqdm

from checkpoint_io import checksums
from checkpoint_io.checksums import get_file_version, is_complete, write_note
from checkpoint_io.urls import SafeRedirects, build_request, refuse_unsafe_url
from errors import UserError, hide_secrets, printable
from runtime.terminal import format_size

log = logging.getLogger("beit")

TIMEOUT = 30  # seconds in which something must come
MIN_BYTES_PER_SECOND = 10 * 1024


#   fetching
class Download(NamedTuple):
    """A file to be downloaded."""

    urls: list[str]  # tried in turn
    cache_path: str  # where it lies, relative to the cache folder
    sha256_prefix: str | None
    guessed: bool  # the prefix was only read off the file's name


class SlowServer(OSError):
    """A server that sends nothing, or so little that waiting for the rest has no
    end.
    """


def download_file(download: Download, target: pathlib.Path, own: str = "") -> None:
    """The file at `target`, complete and checked, from the first of the URLs that gives
    it; or a UserError.

    `own`: in the name of this process's partial file, where several may load the same
    file at once.
    """
    part = target.with_name(f"{target.name}{own}.part")
    failures = []
    for url in download.urls:
        reason: object = None
        for _ in range(5):
            before = part.stat().st_size if part.exists() else 0
            try:
                _fetch_part(url, part, checked_by_hash=download.sha256_prefix is not None)
                return _move_into_cache(part, target, download, url)
            except PermissionError:
                raise
            # another file, or an unsafe redirection: the next address may do better
            except UserError as error:
                if url == download.urls[-1]:
                    raise
                log.warning(f"warning: {error}")
                reason = "refused"
                break
            except (OSError, http.client.HTTPException, ValueError) as error:
                reason = error
            if getattr(reason, "errno", None) == errno.ENOSPC:
                part.unlink(missing_ok=True)
                raise UserError(
                    f"no space left on the disk of {target}: make room; TORCH_HOME names another folder"
                )
            gained = (part.stat().st_size if part.exists() else 0) - before
            # nothing after `before`: start again
            if isinstance(reason, urllib.error.HTTPError) and reason.code == 416:
                part.unlink(missing_ok=True)
            elif gained < (TIMEOUT * MIN_BYTES_PER_SECOND if isinstance(reason, SlowServer) else 1):
                break  # no progress: asking again would not help
        failures.append(f"{url} ({' '.join(str(reason).split()) or type(reason).__name__})")
    raise UserError(
        f"cannot download {', nor '.join(map(hide_secrets, failures))}; download it elsewhere, put it at "
        f"{target} and run again"
    )


def _fetch_part(url: str, part: pathlib.Path, checked_by_hash: bool) -> None:
    """Write what `url` gives to `part`, after what an earlier call for the same file
    has left there.

    OSError or HTTPException: not complete, another call may go on from there.
    UserError: what comes cannot be used.
    """
    # which file the part is of, its version (ETag or date) and its length
    note = part.with_name(part.name + ".from")
    address = ascii(hide_secrets(url))[1:-1]  # signatures change, the file does not
    known, version, length, *_ = [
        *(note.read_text(encoding="utf-8").split("\n") if note.exists() else [address]),
        "",
        "",
    ]
    start = part.stat().st_size if part.exists() and known == address and (version or checked_by_hash) else 0
    request = build_request(url)
    if start:
        request.add_header("Range", f"bytes={start}-")
    if start and version:
        request.add_header("If-Range", version)  # a file that has changed since comes whole
    log.info(f"downloading {address} to {part.parent}" + (f" from byte {start} on" if start else ""))
    with _open_in_background(request) as receive:
        reply = receive()
        refuse_unsafe_url(reply.url)  # after redirections
        _refuse_other_content(reply, url)
        now = _get_reply_version(reply)
        if reply.status == 206:
            total = _parse_total_length(reply, start, int(length or 0))
            if total is None or (version and now not in ("", version)):
                part.unlink(missing_ok=True)
                # The rest of another file, or another part than was asked for: ask for
                # the whole.
                if start:
                    _fetch_part(url, part, checked_by_hash)
                    return
                raise ConnectionError("the server sends a part of the file where the whole was asked for")
        elif reply.status in (200, None):  # None: file://
            start, total = 0, _parse_length(reply.headers.get("Content-Length"))
            part.write_bytes(b"")  # before the note: an older part must not pass for this version
            note.write_text(f"{address}\n{now}\n{total or ''}", encoding="utf-8")
        else:
            raise ConnectionError(f"the server answers {reply.status} {reply.reason}")
        if total is not None and total - start > (free := shutil.disk_usage(part.parent).free):
            raise UserError(
                f"{url}: {format_size(total - start)} are to come, and the disk of {part.parent} has "
                f"{format_size(free)} left; make room, or name another folder with TORCH_HOME"
            )
        _write_body(receive, part, start, total)
    _check_length(part, total)
    told = total is not None or getattr(reply, "chunked", False) or checked_by_hash
    if not told and not is_complete(part):
        raise UserError(
            f"what came from {url} is incomplete, or no file of weights whose end can be checked: the "
            "server does not say how long it is; run again, or download it elsewhere and give its path"
        )


def _refuse_other_content(reply: Any, url: str) -> None:
    """UserError where the reply is not the file itself: compressed, or a web page."""
    coding = reply.headers.get("Content-Encoding", "identity").strip().lower()
    if coding not in ("", "identity"):
        raise UserError(
            f"{url}: the server sends the file compressed ({coding}), although asked not to: it is not used"
        )
    if reply.headers.get_content_type() == "text/html":
        raise UserError(
            f"{url} gives a web page, such as one to log in on: give the address of the file itself"
        )


def _check_length(part: pathlib.Path, total: int | None) -> None:
    """ConnectionError where less or more came than the `total` that the server gave."""
    size = part.stat().st_size
    if size == 0:
        raise ConnectionError("nothing came: the file is empty")
    if total is not None and size != total:
        if size > total:
            part.unlink()
        raise ConnectionError(f"the connection broke off after {size} of {total} bytes")


def _write_body(receive: Callable[[], Any], part: pathlib.Path, start: int, total: int | None) -> None:
    bar = tqdm(
        total=total,
        initial=start,
        unit="B",
        unit_scale=True,
        desc=printable(part.stem),
        file=sys.stderr,
        disable=None,
    )
    since, received = time.monotonic(), 0
    with part.open("ab" if start else "wb") as file, bar:
        while chunk := receive():
            bar.update(file.write(chunk))
            received += len(chunk)
            if (seconds := time.monotonic() - since) > TIMEOUT:
                if received < seconds * MIN_BYTES_PER_SECOND:
                    raise SlowServer(f"the server sends only {received / seconds:.0f} bytes per second")
                since, received = time.monotonic(), 0
        file.flush()
        os.fsync(file.fileno())


@contextlib.contextmanager
def _open_in_background(request: urllib.request.Request) -> Iterator[Callable[[], Any]]:
    """Gives a function that returns the reply, then piece after piece of its body, b""
    at the end.

    SlowServer where the next of them takes longer than TIMEOUT, whatever the server
    does byte by byte in the meantime.
    """
    pieces: queue.Queue[Any] = queue.Queue(maxsize=8)
    abandoned = threading.Event()

    def work() -> None:
        try:
            with urllib.request.build_opener(SafeRedirects).open(request, timeout=TIMEOUT) as reply:
                piece = reply
                while piece and not abandoned.is_set():
                    pieces.put(piece)
                    piece = reply.read1(1 << 20)
            pieces.put(b"")
        except Exception as error:
            pieces.put(error)

    def receive() -> Any:
        try:
            piece = pieces.get(timeout=TIMEOUT)
        except queue.Empty:
            raise SlowServer(f"the server sent nothing for {TIMEOUT} seconds") from None
        if isinstance(piece, Exception):
            raise piece
        return piece

    threading.Thread(target=work, name="download", daemon=True).start()
    try:
        yield receive
    finally:
        abandoned.set()
        with contextlib.suppress(queue.Empty):
            while True:
                pieces.get_nowait()


def _get_reply_version(reply: Any) -> str:
    """What tells one version of a file from another: a strong ETag, else the date, else
    nothing.
    """
    tag = reply.headers.get("ETag") or "W/"
    return (reply.headers.get("Last-Modified") or "") if tag.startswith("W/") else tag


def _parse_length(text: str | None) -> int | None:
    if text is None:
        return None
    if not re.fullmatch(r"[0-9]{1,18}", text.strip()):
        raise ConnectionError("the server gives a Content-Length that is not a number of bytes")
    return int(text)


def _parse_total_length(reply: Any, start: int, known: int) -> int | None:
    """The length of the whole file, of which a 206 brings the rest from `start` on;
    None where it brings anything else.

    `known`: the length that was told before, or 0.
    """
    length = _parse_length(reply.headers.get("Content-Length"))
    given = reply.headers.get("Content-Range")
    if given is None:  # against the rules, but the lengths may tell
        return known if start and known and length == known - start else None
    found = re.fullmatch(r"bytes ([0-9]{1,18})-([0-9]{1,18})/([0-9]{1,18}|\*)", given.strip())
    if found is None or not start:
        return None
    first, last = int(found[1]), int(found[2])
    total = last + 1 if found[3] == "*" else int(found[3])
    fits = first == start <= last == total - 1 and length in (None, last + 1 - first) and known in (0, total)
    return total if fits else None


def _move_into_cache(part: pathlib.Path, target: pathlib.Path, download: Download, url: str) -> None:
    part.with_name(part.name + ".from").unlink(missing_ok=True)
    if (prefix := download.sha256_prefix) is None:
        os.replace(part, target)
        return
    version, digest = get_file_version(part), checksums.hash_file(part)
    if digest.startswith(prefix.lower()):
        os.replace(part, target)
        write_note(target, version, digest)
        return
    came = f"what came from {url} has sha256 {digest[:8]}... instead of {prefix}"
    if download.guessed:
        kept = target.with_name(f"unchecked_{target.name}")
        os.replace(part, kept)
        raise UserError(f"{came}, as in its name; if that is not a hash, use what came: it is kept as {kept}")
    part.unlink()
    raise UserError(f"{came} and was deleted; run again, or put the right file at {target}")
