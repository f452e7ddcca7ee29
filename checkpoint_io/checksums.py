"""Whether a file is the one that was asked for, by its hash, and whether it is
whole.
"""

from __future__ import annotations

import contextlib
import hashlib
import pathlib
import re
import zipfile

import safetensors

from errors import UserError


def find_hash_in_name(name: str) -> str | None:
    """`weights-d5036aa7.pth` -> d5036aa7, torch.hub's convention. Digits alone are more
    likely a date or the number of a run.
    """
    found = re.search(r"-(?=[0-9]*[a-f])([0-9a-f]{8,64})\.", name)
    return found.group(1) if found else None


def hash_file(path: pathlib.Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def hash_file_once(path: pathlib.Path) -> str:
    """The hash of a file in the cache. It is kept in a note beside the file, so that
    not every process of every run has to read the whole file.
    """
    version = get_file_version(path)
    with contextlib.suppress(OSError, ValueError):
        *known, digest = _get_note_path(path).read_text().split()
        if known == version and len(digest) == 64:  # shorter: another process is writing it
            return digest
    digest = hash_file(path)
    write_note(path, version, digest)
    return digest


def _get_note_path(path: pathlib.Path) -> pathlib.Path:
    return path.with_name(path.name + ".checked")


def get_file_version(path: pathlib.Path) -> list[str]:
    """Size in bytes and time of change in ns: a file that is replaced has others."""
    stat = path.stat()
    return [str(stat.st_size), str(stat.st_mtime_ns)]


def write_note(path: pathlib.Path, version: list[str], digest: str) -> None:
    with contextlib.suppress(OSError):  # a cache that many share may be read-only
        _get_note_path(path).write_text(" ".join([*version, digest]))


def verify(
    path: pathlib.Path, sha256_prefix: str | None, guessed: bool = False, cached: bool = False
) -> pathlib.Path:
    """Return `path` if its hash begins with `sha256_prefix` or there is no prefix;
    UserError otherwise. Notes are written in the cache only, not in users' folders.
    """
    if not sha256_prefix:
        return path
    digest = hash_file_once(path) if cached else hash_file(path)
    if digest.startswith(sha256_prefix.lower()):
        return path
    way_out = "; delete it and run again" if cached else ""
    if guessed:
        way_out += f"; if {sha256_prefix} in its name is not a hash, give its path instead of the URL"
    raise UserError(
        f"{path} has sha256 {digest[:8]}... instead of {sha256_prefix}: it is damaged or another "
        f"file{way_out}"
    )


def is_complete(path: pathlib.Path) -> bool:
    """Whether a zip file (torch.save) or safetensors is whole. Other files count as
    incomplete, since nothing in them tells.
    """
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                return archive.testzip() is None
        with safetensors.safe_open(path, "pt") as file:
            return bool(file.keys())
    except Exception:  # a damaged file may fail in any way
        return False
