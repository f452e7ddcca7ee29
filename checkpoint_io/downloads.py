"""Weights by name, path or URL: find them, download them once, check them (`python
model_zoo.py` lists the names).

BEIT_MIRRORS names copies of the published files: base URLs (https:// or file://, blanks
between them), tried in turn before the published address. A base ends where the
published folder begins (`BASE/BEiT-v2/NAME.pth`, `BASE/v1.0/NAME.pth`,
`BASE/dall-e/encoder.pkl`), or holds the bare files (`BASE/NAME.pth`); both are asked
for, in this order.
"""

from __future__ import annotations

import base64
import contextlib
import difflib
import errno
import hashlib
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
import urllib.parse
import urllib.request
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import safetensors
import torch
from tqdm import tqdm

from errors import UserError, hide_secrets, printable

try:
    import fcntl
except ImportError:  # Windows: no lock; several processes may then download the same file
    fcntl = None  # type: ignore[assignment]

log = logging.getLogger("beit")

# ---------------------------------------------------------------------------------------------------
#   what was published
MIRRORS = ["https://github.com/addf400/files/releases/download/"]  # tried in turn
TIMEOUT, MIN_BYTES_PER_SECOND = (
    30,
    10 * 1024,
)  # seconds in which something must come, and bytes a second that it must be
MAX_NAME_BYTES = 150  # bytes of a file's name, to which endings are added
# Hosts of the published links, now closed: the same file is then looked for under MIRRORS.
FORMER_HOSTS = ("conversationhub.blob.core.windows.net", "unilm.blob.core.windows.net")


@dataclass(frozen=True)
class Entry:
    """One published file. `file` is relative to each of MIRRORS, or a whole URL; `model`
    names the builder it fits.
    """

    file: str
    # tokenizer | pretrained | intermediate (ImageNet-21k head) | finetuned |
    # segmentation | tokenizer-v1
    kind: str
    model: str = ""
    classes: int | None = None
    sha256_prefix: str | None = None
    params: float | None = None  # millions, of the model in the file; None: not known
    metrics: Mapping[str, float] = field(default_factory=dict)  # percent; usage of the codebook is a share

    @property
    def name(self) -> str:
        return self.file.rsplit("/", 1)[-1]

    @property
    def published_urls(self) -> list[str]:
        return [self.file] if "://" in self.file else [mirror + self.file for mirror in MIRRORS]

    @property
    def urls(self) -> list[str]:
        """To be tried in turn: the user's mirrors, then what was published."""
        relative = urllib.parse.urlsplit(self.file).path.lstrip("/")
        return [
            base + file for base in _get_user_mirrors() for file in (relative, self.name)
        ] + self.published_urls


CLASSES = {"intermediate": 21841, "finetuned": 1000, "segmentation": 150}  # of the heads in the files


def _make_entry(
    name: str, kind: str, sha256_prefix: str | None = None, params: float | None = None, **metrics: float
) -> Entry:
    """The row of a published name: its file and the builder it fits follow from the name."""
    folder = "v1.0" if name.startswith("beit_") else "BEiT-v2"
    model = name.split("_pt")[0].replace("beitv2", "beit")
    if kind == "pretrained":
        model += "_8k_vocab" if folder == "v1.0" else "_8k_vocab_cls_pt"
    file = f"{folder}/{name}-{sha256_prefix}.pth" if sha256_prefix else f"{folder}/{name}.pth"
    return Entry(
        file, kind, "" if kind == "segmentation" else model, CLASSES.get(kind), sha256_prefix, params, metrics
    )


ROWS: list[tuple[str, str, dict[str, Any]]] = [
    (
        "vqkd_encoder_base_decoder_1x768x12_clip",
        "tokenizer",
        {"params": 94.7, "sha256_prefix": "d93179da", "usage": 1.0},
    ),
    (
        "vqkd_encoder_base_decoder_3x768x12_clip",
        "tokenizer",
        {"params": 108.8, "sha256_prefix": "d5036aa7", "usage": 0.97},
    ),
    (
        "vqkd_encoder_base_decoder_1x768x12_dino",
        "tokenizer",
        {"params": 94.9, "sha256_prefix": "663c55d7", "usage": 1.0},
    ),
    ("beitv2_base_patch16_224_pt1k_300e", "pretrained", {"params": 106.1}),
    ("beitv2_base_patch16_224_pt1k", "pretrained", {"params": 106.1}),
    ("beitv2_large_patch16_224_pt1k_300e", "pretrained", {"params": 336.7}),
    ("beitv2_large_patch16_224_pt1k", "pretrained", {"params": 336.7}),
    ("beitv2_base_patch16_224_pt1k_ft21k", "intermediate", {"params": 102.6}),
    ("beitv2_large_patch16_224_pt1k_ft21k", "intermediate", {"params": 325.8}),
    ("beitv2_base_patch16_224_pt1k_300e_ft1k", "finetuned", {"params": 86.5, "top1": 85.0}),
    ("beitv2_base_patch16_224_pt1k_ft1k", "finetuned", {"params": 86.5, "top1": 85.5, "top5": 97.5}),
    (
        "beitv2_base_patch16_224_pt1k_ft21kto1k",
        "finetuned",
        {"params": 86.5, "top1": 86.458, "top5": 97.978, "loss": 0.569},
    ),
    ("beitv2_large_patch16_224_pt1k_300e_ft1k", "finetuned", {"params": 304.4, "top1": 86.6}),
    ("beitv2_large_patch16_224_pt1k_ft1k", "finetuned", {"params": 304.4, "top1": 87.3, "top5": 98.2}),
    (
        "beitv2_large_patch16_224_pt1k_ft21kto1k",
        "finetuned",
        {"params": 304.4, "top1": 88.37, "top5": 98.578, "loss": 0.493},
    ),
    ("beitv2_base_patch16_224_pt1k_ftade20k", "segmentation", {"miou": 53.1}),
    ("beitv2_base_patch16_224_pt1k_ft21ktoade20k", "segmentation", {"miou": 53.5}),
    ("beitv2_large_patch16_224_pt1k_ftade20k", "segmentation", {"miou": 56.7}),
    (
        "beitv2_large_patch16_224_pt1k_ft21ktoade20k",
        "segmentation",
        {"miou": 57.54, "macc": 68.78, "aacc": 86.22},
    ),
    ("beit_base_patch16_224_pt22k", "pretrained", {"params": 92.0}),
    ("beit_large_patch16_224_pt22k", "pretrained", {"params": 311.5}),
    ("beit_base_patch16_224_pt22k_ft22k", "intermediate", {"params": 102.6}),
    ("beit_large_patch16_224_pt22k_ft22k", "intermediate", {"params": 325.8}),
    ("beit_base_patch16_224_pt22k_ft1k", "finetuned", {"params": 86.5, "top1": 83.7}),
    ("beit_base_patch16_224_pt22k_ft22kto1k", "finetuned", {"params": 86.5, "top1": 85.2}),
    (
        "beit_base_patch16_384_pt22k_ft22kto1k",
        "finetuned",
        {"params": 86.7, "top1": 86.82, "top5": 98.124, "loss": 0.565},
    ),
    (
        "beit_large_patch16_224_pt22k_ft22kto1k",
        "finetuned",
        {"params": 304.4, "top1": 87.396, "top5": 98.282, "loss": 0.515},
    ),
    (
        "beit_large_patch16_384_pt22k_ft22kto1k",
        "finetuned",
        {"params": 305.0, "top1": 88.408, "top5": 98.602, "loss": 0.479},
    ),
    (
        "beit_large_patch16_512_pt22k_ft22kto1k",
        "finetuned",
        {"params": 305.7, "top1": 88.6, "top5": 98.658, "loss": 0.474},
    ),
]
ENTRIES = {name: _make_entry(name, kind, **facts) for name, kind, facts in ROWS}
ENTRIES["dall_e_encoder"] = Entry("https://cdn.openai.com/dall-e/encoder.pkl", "tokenizer-v1", params=53.8)


# -------------------------------------------------------------------------------------------------------------
#   fetching
class Download(NamedTuple):
    """A file to be downloaded."""

    urls: list[str]  # tried in turn
    cache_path: str  # where it lies, relative to the cache folder
    sha256_prefix: str | None
    guessed: bool  # the prefix was only read off the file's name


def fetch(source: str | os.PathLike[str], sha256_prefix: str | None = None) -> pathlib.Path:
    """The file behind `source`: an existing path, a name of ENTRIES, or a URL (https://,
    file://, http:// see below).

    A download goes to `checkpoints/` in torch.hub's folder (TORCH_HOME moves it), once,
    also when several processes ask at the same time; one that broke off is resumed.
    Published files and those with a hash in their name lie there under torch.hub's
    names, others in a folder for their address. A file must match `sha256_prefix`, or
    the prefix the zoo knows, or one in its name (`-d5036aa7.pth`), also when it was put
    there by hand. http:// is refused unless the host is this machine or
    BEIT_ALLOW_HTTP=1. UserError: nothing there, unreachable, another hash.
    """
    source = os.fspath(source)
    # pathlib's is_file fails on a URL longer than a file name
    if os.path.isfile(here := os.path.expanduser(source)):
        return _verify(pathlib.Path(here), sha256_prefix)
    if source not in ENTRIES and "://" not in source:
        raise _explain_missing(source)
    if "://" in source and (parts := _split_url(source)).scheme == "file":
        path = pathlib.Path(urllib.request.url2pathname(parts.path))
        if not path.is_file():
            raise UserError(f"{source}: there is no such file")
        return _verify(path, sha256_prefix or _find_hash_in_name(path.name), guessed=sha256_prefix is None)
    download = _plan_download(source, sha256_prefix)
    target = cache_folder() / download.cache_path
    if not target.exists():
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with _lock(target) as alone:
                if not target.exists():
                    _download(download, target, "" if alone else f".{os.getpid()}")
        except PermissionError as error:
            raise UserError(
                f"cannot write {target} ({error.strerror}); TORCH_HOME names another folder"
            ) from error
    return _verify(target, download.sha256_prefix, download.guessed, cached=True)


def cache_folder() -> pathlib.Path:
    return pathlib.Path(torch.hub.get_dir()) / "checkpoints"


def _explain_missing(source: str) -> UserError:
    if os.path.isdir(os.path.expanduser(source)):  # pathlib's is_dir fails on a name that is too long
        return UserError(f"{source} is a folder: name the weight file in it")
    near = difflib.get_close_matches(pathlib.PurePath(source).stem, ENTRIES, n=3, cutoff=0.6)
    offer = f"did you mean {' or '.join(near)}?" if near else "`python model_zoo.py` lists the names."
    return UserError(f"{source} is neither a file, nor a URL, nor a name of published weights; {offer}")


def _plan_download(source: str, sha256_prefix: str | None) -> Download:
    """What to download for a name of ENTRIES or a URL."""
    if entry := ENTRIES.get(source):
        return Download(entry.urls, entry.name, sha256_prefix or entry.sha256_prefix, guessed=False)
    _refuse_unsafe_url(source)
    parts = _split_url(source)
    query = urllib.parse.parse_qs(parts.query)
    if "sv" in query and "sig" not in query:
        raise UserError(
            f"the URL {source} was cut at its first '&', and every flag after it was lost: the shell "
            "takes an unquoted "
            "'&' for the end of the command; put the whole URL in quotes"
        )
    name = re.split(r"[/\\]", urllib.parse.unquote(parts.path))[-1]
    name = "".join("_" if c in ':*?"<>|' or not c.isprintable() else c for c in name)
    name = name.encode()[-MAX_NAME_BYTES:].decode(errors="ignore")
    if name in ("", ".", ".."):
        raise UserError(f"{source} names no file: give the URL of the weights themselves")
    for entry in ENTRIES.values():
        if source.split("?")[0] in entry.published_urls or (
            parts.hostname in FORMER_HOSTS and entry.name == name
        ):
            urls = list(dict.fromkeys([source, *entry.urls]))
            return Download(urls, entry.name, sha256_prefix or entry.sha256_prefix, guessed=False)
    in_name = _find_hash_in_name(name)
    cache_path = (
        name if in_name else f"{_hash_address(parts)}/{name}"
    )  # any two runs have a checkpoint-best.pth
    return Download([source], cache_path, sha256_prefix or in_name, guessed=not sha256_prefix)


def _split_url(url: str) -> urllib.parse.SplitResult:
    """The parts of a URL; UserError where it is none."""
    try:
        parts = urllib.parse.urlsplit(url)
        if parts.scheme != "file" and (
            not parts.hostname or re.search(r"[\s\\%]", parts.hostname) or parts.port == 0
        ):
            raise ValueError
    except ValueError:  # of urlsplit and of `port`; what they say may hold a part of a password
        raise UserError(
            f"{url} is no URL that can be read: https://host/path is one; in a user's name or "
            "password write / as %2F, "
            "? as %3F, # as %23, @ as %40"
        ) from None
    return parts


def _hash_address(parts: urllib.parse.SplitResult) -> str:
    """8 hex digits of host and path, and of a query that may choose the file; a signature does not, and changes."""
    signed = any(key.lower().endswith(("sig", "signature")) for key in urllib.parse.parse_qs(parts.query))
    address = f"{parts.netloc.rpartition('@')[2].lower()}{parts.path}" + ("" if signed else f"?{parts.query}")
    return hashlib.sha256(address.encode(errors="surrogateescape")).hexdigest()[:8]


def _get_user_mirrors() -> list[str]:
    """The base URLs in BEIT_MIRRORS, each with a slash at its end."""
    bases = os.environ.get("BEIT_MIRRORS", "").split()
    for base in bases:
        if "://" not in base or "?" in base:
            raise UserError(
                f"BEIT_MIRRORS: {base} is no https:// or file:// address, without a ?, to which "
                "/BEiT-v2/NAME.pth can be added"
            )
        _refuse_unsafe_url(base)
    return [base.rstrip("/") + "/" for base in bases]


def _refuse_unsafe_url(url: str) -> None:
    """Only what cannot be altered on its way: https, this machine, or what the user has allowed."""
    parts = _split_url(url)
    if parts.scheme in ("https", "file"):
        return
    if parts.scheme != "http":
        raise UserError(f"{url}: weights are read from https:// or file:// URLs, or from a path")
    if parts.hostname not in ("localhost", "127.0.0.1", "::1") and os.environ.get("BEIT_ALLOW_HTTP") != "1":
        raise UserError(
            f"{url}: http:// can be tampered with on its way; use https://, or set BEIT_ALLOW_HTTP=1"
        )


def _find_hash_in_name(name: str) -> str | None:
    """`weights-d5036aa7.pth` -> d5036aa7, torch.hub's convention. Digits alone are rather
    a date or a number of a run.
    """
    found = re.search(r"-(?=[0-9]*[a-f])([0-9a-f]{8,64})\.", name)
    return found.group(1) if found else None


def _digest(path: pathlib.Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _digest_once(path: pathlib.Path) -> str:
    """The hash of a file in the cache. A note beside it spares every process of every run
    the reading of the file.
    """
    version = _file_version(path)
    with contextlib.suppress(OSError, ValueError):
        *known, digest = _note_path(path).read_text().split()
        if known == version and len(digest) == 64:  # shorter: another process is writing it
            return digest
    digest = _digest(path)
    _write_note(path, version, digest)
    return digest


def _note_path(path: pathlib.Path) -> pathlib.Path:
    return path.with_name(path.name + ".checked")


def _file_version(path: pathlib.Path) -> list[str]:
    """Size in bytes and time of change in ns: a file that is replaced has others."""
    stat = path.stat()
    return [str(stat.st_size), str(stat.st_mtime_ns)]


def _write_note(path: pathlib.Path, version: list[str], digest: str) -> None:
    with contextlib.suppress(OSError):  # a cache that many share may be read-only
        _note_path(path).write_text(" ".join([*version, digest]))


def _verify(
    path: pathlib.Path, sha256_prefix: str | None, guessed: bool = False, cached: bool = False
) -> pathlib.Path:
    """`path`; with a prefix only if its hash begins with it. Notes are written in the
    cache only, not in users' folders.
    """
    if sha256_prefix and not (digest := (_digest_once if cached else _digest)(path)).startswith(
        sha256_prefix.lower()
    ):
        way_out = "; delete it and run again" if cached else ""
        if guessed:
            way_out += f"; if {sha256_prefix} in its name is no hash, give its path instead of the URL"
        raise UserError(
            f"{path} has sha256 {digest[:8]}... instead of {sha256_prefix}: it is damaged "
            f"or another file{way_out}"
        )
    return path


@contextlib.contextmanager
def _lock(target: pathlib.Path) -> Iterator[bool]:
    """Gives whether that can be had here; else each process needs a partial file of its own."""
    lock, alone = target.with_name(target.name + ".lock"), False
    with lock.open("w") as handle:
        if fcntl is not None:
            with contextlib.suppress(OSError):  # some network file systems know no locks
                fcntl.flock(handle, fcntl.LOCK_EX)
                alone = True
        yield alone
    # Only after success: whoever opens a new lock from here on finds the file and downloads nothing.
    lock.unlink(missing_ok=True)


class _SlowError(OSError):
    """A server that sends nothing, or so little that waiting for the rest has no end."""


def _download(download: Download, target: pathlib.Path, own: str = "") -> None:
    """The file at `target`, complete and checked, from the first of the URLs that gives it; or a UserError.

    `own`: in the name of this process's partial file, where several may load the same file at once.
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
            except (
                UserError
            ) as error:  # another file, or an unsafe redirection: the next address may do better
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
            # nothing after `before`: start anew
            if isinstance(reason, urllib.error.HTTPError) and reason.code == 416:
                part.unlink(missing_ok=True)
            elif gained < (TIMEOUT * MIN_BYTES_PER_SECOND if isinstance(reason, _SlowError) else 1):
                break  # no progress: asking again would not help
        failures.append(f"{url} ({' '.join(str(reason).split()) or type(reason).__name__})")
    raise UserError(
        f"cannot download {', nor '.join(map(hide_secrets, failures))}; download it elsewhere, put it "
        f"at {target} and run again"
    )


def _fetch_part(url: str, part: pathlib.Path, checked_by_hash: bool) -> None:
    """Write what `url` gives to `part`, after what an earlier call for the same file has left there.

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
    request = _build_request(url)
    if start:
        request.add_header("Range", f"bytes={start}-")
    if start and version:
        request.add_header("If-Range", version)  # a file that has changed since comes whole
    log.info(f"downloading {address} to {part.parent}" + (f" from byte {start} on" if start else ""))
    with _open_in_background(request) as receive:
        reply = receive()
        _refuse_unsafe_url(reply.url)  # after redirections
        if (coding := reply.headers.get("Content-Encoding", "identity").strip().lower()) not in (
            "",
            "identity",
        ):
            raise UserError(
                f"{url}: the server sends the file compressed ({coding}), although asked "
                "not to: it is not used"
            )
        if reply.headers.get_content_type() == "text/html":
            raise UserError(
                f"{url} gives a web page, such as one to log in on: give the address of the file itself"
            )
        now = _reply_version(reply)
        if reply.status == 206:
            total = _parse_total_length(reply, start, int(length or 0))
            if total is None or (version and now not in ("", version)):
                part.unlink(missing_ok=True)
                # the rest of another file, or another part than was asked for: once
                # more, the whole
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
                f"{format_size(free)} "
                "left; make room, or name another folder with TORCH_HOME"
            )
        _write_body(receive, part, start, total)
    size = part.stat().st_size
    if size == 0:
        raise ConnectionError("nothing came: the file is empty")
    if total is not None and size != total:
        if size > total:
            part.unlink()
        raise ConnectionError(f"the connection broke off after {size} of {total} bytes")
    if (
        total is None
        and not getattr(reply, "chunked", False)
        and not checked_by_hash
        and not _is_complete(part)
    ):
        raise UserError(
            f"what came from {url} is incomplete, or no file of weights whose end can be checked: the "
            "server does not say how "
            "long it is; run again, or download it elsewhere and give its path"
        )


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
                    raise _SlowError(f"the server sends only {received / seconds:.0f} bytes a second")
                since, received = time.monotonic(), 0
        file.flush()
        os.fsync(file.fileno())


def _build_request(url: str) -> urllib.request.Request:
    """For the file as it is. A user's name and password in the URL go to its own host
    alone, not where it redirects to.
    """
    parts = _split_url(url)
    user, _, host = parts.netloc.rpartition("@")
    clean = parts._replace(netloc=host, fragment="").geturl()
    clean = urllib.parse.quote(clean, safe="%/:=&?~+!$,;'@()*[]|", errors="surrogateescape")
    request = urllib.request.Request(
        clean, headers={"User-Agent": "beit-model-zoo", "Accept-Encoding": "identity"}
    )
    if user:
        secret = base64.b64encode(urllib.parse.unquote_to_bytes(user)).decode("ascii")
        request.add_unredirected_header("Authorization", f"Basic {secret}")
    return request


class _SafeRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, req: Any, fp: Any, code: Any, msg: Any, headers: Any, newurl: str) -> Any:
        _refuse_unsafe_url(newurl)
        parts = _split_url(newurl)
        if req.type == "https" and parts.scheme != "https":
            raise UserError(
                f"{req.full_url} redirects to {newurl}, which can be tampered with on its "
                "way: it is not followed"
            )
        newurl = parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
        new = super().redirect_request(req, fp, code, msg, headers, newurl)
        secret = req.unredirected_hdrs.get("Authorization")
        if new is not None and secret and (new.type, new.host) == (req.type, req.host):
            new.add_unredirected_header("Authorization", secret)
        return new


@contextlib.contextmanager
def _open_in_background(request: urllib.request.Request) -> Iterator[Callable[[], Any]]:
    """Gives a function that returns the reply, then piece after piece of its body, b"" at the end.

    _SlowError where the next of them takes longer than TIMEOUT, whatever the server
    does byte by byte in the meantime.
    """
    pieces: queue.Queue[Any] = queue.Queue(maxsize=8)
    abandoned = threading.Event()

    def work() -> None:
        try:
            with urllib.request.build_opener(_SafeRedirects).open(request, timeout=TIMEOUT) as reply:
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
            raise _SlowError(f"the server sent nothing for {TIMEOUT} seconds") from None
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


def _reply_version(reply: Any) -> str:
    """What tells one version of a file from another: a strong ETag, else the date, else nothing."""
    tag = reply.headers.get("ETag") or "W/"
    return (reply.headers.get("Last-Modified") or "") if tag.startswith("W/") else tag


def _parse_length(text: str | None) -> int | None:
    if text is None:
        return None
    if not re.fullmatch(r"[0-9]{1,18}", text.strip()):
        raise ConnectionError("the server gives a Content-Length that is no number of bytes")
    return int(text)


def _parse_total_length(reply: Any, start: int, known: int) -> int | None:
    """The length of the whole file, of which a 206 brings the rest from `start` on; None
    where it brings anything else.

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


def _is_complete(path: pathlib.Path) -> bool:
    """Whether a zip file (torch.save) or safetensors is whole. Of other files nothing tells it."""
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                return archive.testzip() is None
        with safetensors.safe_open(path, "pt") as file:
            return bool(file.keys())
    except Exception:  # a damaged file may fail in any way
        return False


def _move_into_cache(part: pathlib.Path, target: pathlib.Path, download: Download, url: str) -> None:
    part.with_name(part.name + ".from").unlink(missing_ok=True)
    if (prefix := download.sha256_prefix) is None:
        os.replace(part, target)
        return
    version, digest = _file_version(part), _digest(part)
    if digest.startswith(prefix.lower()):
        os.replace(part, target)
        _write_note(target, version, digest)
        return
    came = f"what came from {url} has sha256 {digest[:8]}... instead of {prefix}"
    if download.guessed:
        kept = target.with_name(f"unchecked_{target.name}")
        os.replace(part, kept)
        raise UserError(f"{came}, as in its name; if that is no hash, use what came: it is kept as {kept}")
    part.unlink()
    raise UserError(f"{came} and was deleted; run again, or put the right file at {target}")


def format_size(n_bytes: float) -> str:
    return f"{n_bytes / 2**20:.0f} MiB" if n_bytes < 2**30 else f"{n_bytes / 2**30:.1f} GiB"
