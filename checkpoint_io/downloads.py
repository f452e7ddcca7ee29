"""Weights by name, path or URL: find them, download them once, check them."""

from __future__ import annotations

import contextlib
import difflib
import os
import pathlib
import re
import urllib.parse
import urllib.request
from collections.abc import Iterator

import torch

from checkpoint_io import hub
from checkpoint_io.checksums import find_hash_in_name, verify
from checkpoint_io.published import ENTRIES, find_entry
from checkpoint_io.url_download import Download, download_file
from checkpoint_io.urls import hash_address, refuse_unsafe_url, split_url
from errors import UserError

try:
    import fcntl
except ImportError:  # Windows: no lock; several processes may then download the same file
    fcntl = None  # type: ignore[assignment]

MAX_NAME_BYTES = 150  # bytes of a file's name, to which endings are added


def fetch(source: str | os.PathLike[str], sha256_prefix: str | None = None) -> pathlib.Path:
    """The file behind `source`: an existing path, a name of ENTRIES, a URL (https://,
    file://, http:// see below), or an id of Hugging Face's hub (hub.fetch_model).

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
        return verify(pathlib.Path(here), sha256_prefix)
    if source not in ENTRIES and "://" not in source:
        if hub.is_hub_id(source) and not os.path.isdir(here):
            return verify(hub.fetch_model(source), sha256_prefix)
        raise _explain_missing(source)
    if "://" in source and (parts := split_url(source)).scheme == "file":
        path = pathlib.Path(urllib.request.url2pathname(parts.path))
        if not path.is_file():
            raise UserError(f"{source}: there is no such file")
        return verify(path, sha256_prefix or find_hash_in_name(path.name), guessed=sha256_prefix is None)
    download = _plan_download(source, sha256_prefix)
    target = get_cache_folder() / download.cache_path
    if not target.exists():
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with _lock(target) as alone:
                if not target.exists():
                    download_file(download, target, "" if alone else f".{os.getpid()}")
        except PermissionError as error:
            raise UserError(
                f"cannot write {target} ({error.strerror}); TORCH_HOME names another folder"
            ) from error
    return verify(target, download.sha256_prefix, download.guessed, cached=True)


def get_cache_folder() -> pathlib.Path:
    return pathlib.Path(torch.hub.get_dir()) / "checkpoints"


def _explain_missing(source: str) -> UserError:
    if os.path.isdir(os.path.expanduser(source)):  # pathlib's is_dir fails on a name that is too long
        return UserError(f"{source} is a folder: name the weight file in it")
    near = difflib.get_close_matches(pathlib.PurePath(source).stem, ENTRIES, n=3, cutoff=0.6)
    offer = f"did you mean {' or '.join(near)}?" if near else "`python model_zoo.py` lists the names."
    return UserError(f"{source} is neither a file, nor a URL, nor a name of published weights; {offer}")


def is_cut_url(source: str) -> bool:
    """A signed URL without its signature: an unquoted '&' ends a command of the shell."""
    query = urllib.parse.parse_qs(split_url(source).query) if "://" in source else {}
    return "sv" in query and "sig" not in query


def explain_cut_url(what: str) -> str:
    return (
        f"{what} was cut at its first '&', and every flag after it was lost: the shell takes an unquoted "
        "'&' for the end of the command; put the whole URL in quotes"
    )


def _plan_download(source: str, sha256_prefix: str | None) -> Download:
    """What to download for a name of ENTRIES or a URL."""
    if entry := ENTRIES.get(source):
        return Download(entry.urls, entry.name, sha256_prefix or entry.sha256_prefix, guessed=False)
    refuse_unsafe_url(source)
    parts = split_url(source)
    if is_cut_url(source):
        raise UserError(explain_cut_url(f"the URL {source}"))
    name = re.split(r"[/\\]", urllib.parse.unquote(parts.path))[-1]
    name = "".join("_" if c in ':*?"<>|' or not c.isprintable() else c for c in name)
    name = name.encode()[-MAX_NAME_BYTES:].decode(errors="ignore")
    if name in ("", ".", ".."):
        raise UserError(f"{source} names no file: give the URL of the weights themselves")
    if entry := find_entry(source, name):
        urls = list(dict.fromkeys([source, *entry.urls]))
        return Download(urls, entry.name, sha256_prefix or entry.sha256_prefix, guessed=False)
    in_name = find_hash_in_name(name)
    # a folder for the address: any two runs have a checkpoint-best.pth
    cache_path = name if in_name else f"{hash_address(parts)}/{name}"
    return Download([source], cache_path, sha256_prefix or in_name, guessed=not sha256_prefix)


@contextlib.contextmanager
def _lock(target: pathlib.Path) -> Iterator[bool]:
    """Locks the download of `target` and gives whether locks work here; where they do
    not, each process needs a partial file of its own.
    """
    lock, alone = target.with_name(target.name + ".lock"), False
    with lock.open("w") as handle:
        if fcntl is not None:
            with contextlib.suppress(OSError):  # some network file systems know no locks
                fcntl.flock(handle, fcntl.LOCK_EX)
                alone = True
        yield alone
    # Only after success: a process that opens a new lock from here on finds the
    # file and downloads nothing.
    lock.unlink(missing_ok=True)
