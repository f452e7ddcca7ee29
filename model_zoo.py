"""Weights by name, path or URL: find them, download them once, check them.

`python model_zoo.py` prints the published weights with the accuracy that was published for each;
`python model_zoo.py NAME ...` downloads them (say, on a login node) and prints where they lie.

BEIT_MIRRORS names copies of the published files: base URLs (https:// or file://, blanks between them), tried in turn before
the published address. A base ends where the published folder begins (`BASE/BEiT-v2/NAME.pth`, `BASE/v1.0/NAME.pth`,
`BASE/dall-e/encoder.pkl`), or holds the bare files (`BASE/NAME.pth`); both are asked for, in this order.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import hashlib
import http.client
import logging
import os
import pathlib
import re
import sys
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from errors import UserError, pick, tells_the_user

try:
    import fcntl
except ImportError:  # Windows: no lock; several processes may then download the same file
    fcntl = None  # type: ignore[assignment]

log = logging.getLogger("beit")

# --------------------------------------------------------------------------------------------------- what was published
MIRRORS = ["https://github.com/addf400/files/releases/download/"]  # tried in turn
# Hosts of the published links, now closed: the same file is then looked for under MIRRORS.
FORMER_HOSTS = ("conversationhub.blob.core.windows.net", "unilm.blob.core.windows.net")


@dataclass(frozen=True)
class Entry:
    """One published file. `file` is relative to each of MIRRORS, or a whole URL; `model` names the builder it fits."""

    file: str
    kind: str  # tokenizer | pretrained | intermediate (ImageNet-21k head) | finetuned | segmentation | tokenizer-v1
    model: str = ""
    classes: int | None = None
    sha256_prefix: str | None = None
    params: float | None = None  # millions, of the model in the file; None: not known
    metrics: Mapping[str, float] = field(default_factory=dict)  # percent; usage of the codebook is a share

    @property
    def name(self) -> str:
        return self.file.rsplit("/", 1)[-1]

    @property
    def published(self) -> list[str]:
        return [self.file] if "://" in self.file else [mirror + self.file for mirror in MIRRORS]

    @property
    def urls(self) -> list[str]:
        """To be tried in turn: the user's mirrors, then what was published."""
        relative = urllib.parse.urlsplit(self.file).path.lstrip("/")
        return [base + file for base in _users_mirrors() for file in (relative, self.name)] + self.published


CLASSES = {"intermediate": 21841, "finetuned": 1000, "segmentation": 150}  # of the heads in the files


def _entry(name: str, kind: str, sha256_prefix: str | None = None, params: float | None = None, **metrics: float) -> Entry:
    """The row of a published name: its file and the builder it fits follow from the name."""
    folder = "v1.0" if name.startswith("beit_") else "BEiT-v2"
    model = name.split("_pt")[0].replace("beitv2", "beit")
    if kind == "pretrained":
        model += "_8k_vocab" if folder == "v1.0" else "_8k_vocab_cls_pt"
    file = f"{folder}/{name}-{sha256_prefix}.pth" if sha256_prefix else f"{folder}/{name}.pth"
    return Entry(file, kind, "" if kind == "segmentation" else model, CLASSES.get(kind), sha256_prefix, params, metrics)


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
    ("beitv2_base_patch16_224_pt1k_ft21kto1k", "finetuned", {"params": 86.5, "top1": 86.458, "top5": 97.978, "loss": 0.569}),
    ("beitv2_large_patch16_224_pt1k_300e_ft1k", "finetuned", {"params": 304.4, "top1": 86.6}),
    ("beitv2_large_patch16_224_pt1k_ft1k", "finetuned", {"params": 304.4, "top1": 87.3, "top5": 98.2}),
    ("beitv2_large_patch16_224_pt1k_ft21kto1k", "finetuned", {"params": 304.4, "top1": 88.37, "top5": 98.578, "loss": 0.493}),
    ("beitv2_base_patch16_224_pt1k_ftade20k", "segmentation", {"miou": 53.1}),
    ("beitv2_base_patch16_224_pt1k_ft21ktoade20k", "segmentation", {"miou": 53.5}),
    ("beitv2_large_patch16_224_pt1k_ftade20k", "segmentation", {"miou": 56.7}),
    ("beitv2_large_patch16_224_pt1k_ft21ktoade20k", "segmentation", {"miou": 57.54, "macc": 68.78, "aacc": 86.22}),
    ("beit_base_patch16_224_pt22k", "pretrained", {"params": 92.0}),
    ("beit_large_patch16_224_pt22k", "pretrained", {"params": 311.5}),
    ("beit_base_patch16_224_pt22k_ft22k", "intermediate", {"params": 102.6}),
    ("beit_large_patch16_224_pt22k_ft22k", "intermediate", {"params": 325.8}),
    ("beit_base_patch16_224_pt22k_ft1k", "finetuned", {"params": 86.5, "top1": 83.7}),
    ("beit_base_patch16_224_pt22k_ft22kto1k", "finetuned", {"params": 86.5, "top1": 85.2}),
    ("beit_base_patch16_384_pt22k_ft22kto1k", "finetuned", {"params": 86.7, "top1": 86.82, "top5": 98.124, "loss": 0.565}),
    ("beit_large_patch16_224_pt22k_ft22kto1k", "finetuned", {"params": 304.4, "top1": 87.396, "top5": 98.282, "loss": 0.515}),
    ("beit_large_patch16_384_pt22k_ft22kto1k", "finetuned", {"params": 305.0, "top1": 88.408, "top5": 98.602, "loss": 0.479}),
    ("beit_large_patch16_512_pt22k_ft22kto1k", "finetuned", {"params": 305.7, "top1": 88.6, "top5": 98.658, "loss": 0.474}),
]
ENTRIES = {name: _entry(name, kind, **facts) for name, kind, facts in ROWS}
ENTRIES["dall_e_encoder"] = Entry("https://cdn.openai.com/dall-e/encoder.pkl", "tokenizer-v1", params=53.8)


# ------------------------------------------------------------------------------------------------------------- fetching
class Wanted(NamedTuple):
    """A file to be downloaded."""

    urls: list[str]  # tried in turn
    place: str  # where it lies, relative to the cache folder
    sha256_prefix: str | None
    guessed: bool  # the prefix was only read off the file's name


def fetch(source: str | os.PathLike[str], sha256_prefix: str | None = None) -> pathlib.Path:
    """The file behind `source`: an existing path, a name of ENTRIES, or a URL (https://, file://, http:// see below).

    A download goes to `checkpoints/` in torch.hub's folder (TORCH_HOME moves it), once, also when several processes ask
    at the same time; one that broke off is resumed. Published files and those with a hash in their name lie there under
    torch.hub's names, others in a folder for their address. A file must match `sha256_prefix`, or the prefix the zoo
    knows, or one in its name (`-d5036aa7.pth`), also when it was put there by hand. http:// is refused unless the host is
    this machine or BEIT_ALLOW_HTTP=1. UserError: nothing there, unreachable, another hash.
    """
    source = os.fspath(source)
    if os.path.isfile(here := os.path.expanduser(source)):  # pathlib's is_file fails on a URL longer than a file name
        return _checked(pathlib.Path(here), sha256_prefix)
    if source not in ENTRIES and "://" not in source:
        raise _no_such_file(source)
    parts = urllib.parse.urlsplit(source)
    if parts.scheme == "file":
        path = pathlib.Path(urllib.request.url2pathname(parts.path))
        if not path.is_file():
            raise UserError(f"{source}: there is no such file")
        return _checked(path, sha256_prefix or _hash_in_name(path.name), guessed=sha256_prefix is None)
    wanted = _wanted(source, sha256_prefix)
    target = _cache_folder() / wanted.place
    if not target.exists():
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with _one_process_at_a_time(target):
                if not target.exists():
                    _download(wanted, target)
        except PermissionError as error:
            raise UserError(f"cannot write {target} ({error.strerror}); TORCH_HOME names another folder") from error
    return _checked(target, wanted.sha256_prefix, wanted.guessed, cached=True)


def _cache_folder() -> pathlib.Path:
    return pathlib.Path(torch.hub.get_dir()) / "checkpoints"


def _no_such_file(source: str) -> UserError:
    path = pathlib.Path(source).expanduser()
    if path.is_dir():
        return UserError(f"{source} is a folder: name the weight file in it")
    near = difflib.get_close_matches(path.name.removesuffix(path.suffix), ENTRIES, n=3, cutoff=0.6)
    offer = f"did you mean {' or '.join(near)}?" if near else "`python model_zoo.py` lists the names."
    return UserError(f"{source} is neither a file, nor a URL, nor a name of published weights; {offer}")


def _wanted(source: str, sha256_prefix: str | None) -> Wanted:
    """What to download for a name of ENTRIES or a URL."""
    if entry := ENTRIES.get(source):
        return Wanted(entry.urls, entry.name, sha256_prefix or entry.sha256_prefix, guessed=False)
    _refuse_unsafe(source)
    parts = urllib.parse.urlsplit(source)
    query = urllib.parse.parse_qs(parts.query)
    if "sv" in query and "sig" not in query:
        raise UserError(
            f"the URL {source} was cut at its first '&', and every flag after it was lost: the shell takes an unquoted "
            "'&' for the end of the command; put the whole URL in quotes"
        )
    name = pathlib.PurePosixPath(urllib.parse.unquote(parts.path)).name
    if name in ("", ".."):
        raise UserError(f"{source} names no file: give the URL of the weights themselves")
    for entry in ENTRIES.values():
        if source.split("?")[0] in entry.published or (parts.hostname in FORMER_HOSTS and entry.name == name):
            urls = list(dict.fromkeys([source, *entry.urls]))
            return Wanted(urls, entry.name, sha256_prefix or entry.sha256_prefix, guessed=False)
    in_name = _hash_in_name(name)
    place = name if in_name else f"{_address_hash(parts)}/{name}"  # any two runs have a checkpoint-best.pth
    return Wanted([source], place, sha256_prefix or in_name, guessed=not sha256_prefix)


def _address_hash(parts: urllib.parse.SplitResult) -> str:
    """8 hex digits of host and path, and of a query that may choose the file; a signature does not, and changes."""
    signed = any(key.lower().endswith(("sig", "signature")) for key in urllib.parse.parse_qs(parts.query))
    address = f"{parts.netloc.rpartition('@')[2].lower()}{parts.path}" + ("" if signed else f"?{parts.query}")
    return hashlib.sha256(address.encode()).hexdigest()[:8]


def _users_mirrors() -> list[str]:
    """The base URLs in BEIT_MIRRORS, each with a slash at its end."""
    bases = os.environ.get("BEIT_MIRRORS", "").split()
    for base in bases:
        if "://" not in base or "?" in base:
            raise UserError(f"BEIT_MIRRORS: {base} is no https:// or file:// address to which /BEiT-v2/NAME.pth can be added")
        _refuse_unsafe(base)
    return [base.rstrip("/") + "/" for base in bases]


def _refuse_unsafe(url: str) -> None:
    """Only what cannot be altered on its way: https, this machine, or what the user has allowed."""
    parts = urllib.parse.urlsplit(url)
    if parts.scheme in ("https", "file"):
        return
    if parts.scheme != "http":
        raise UserError(f"{url}: weights are read from https:// or file:// URLs, or from a path")
    if parts.hostname not in ("localhost", "127.0.0.1", "::1") and os.environ.get("BEIT_ALLOW_HTTP") != "1":
        raise UserError(f"{url}: http:// can be tampered with on its way; use https://, or set BEIT_ALLOW_HTTP=1")


def _hash_in_name(name: str) -> str | None:
    """`weights-d5036aa7.pth` -> d5036aa7, torch.hub's convention. Digits alone are rather a date or a number of a run."""
    found = re.search(r"-(?=[0-9]*[a-f])([0-9a-f]{8,64})\.", name)
    return found.group(1) if found else None


def _digest(path: pathlib.Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _digest_once(path: pathlib.Path) -> str:
    """The hash of a file in the cache. A note beside it spares every process of every run the reading of the file."""
    version = _version(path)
    with contextlib.suppress(OSError, ValueError):
        *known, digest = _note(path).read_text().split()
        if known == version and len(digest) == 64:  # shorter: another process is writing it
            return digest
    digest = _digest(path)
    _take_note(path, version, digest)
    return digest


def _note(path: pathlib.Path) -> pathlib.Path:
    return path.with_name(path.name + ".checked")


def _version(path: pathlib.Path) -> list[str]:
    """Size in bytes and time of change in ns: a file that is replaced has others."""
    stat = path.stat()
    return [str(stat.st_size), str(stat.st_mtime_ns)]


def _take_note(path: pathlib.Path, version: list[str], digest: str) -> None:
    with contextlib.suppress(OSError):  # a cache that many share may be read-only
        _note(path).write_text(" ".join([*version, digest]))


def _checked(path: pathlib.Path, sha256_prefix: str | None, guessed: bool = False, cached: bool = False) -> pathlib.Path:
    """`path`; with a prefix only if its hash begins with it. Notes are written in the cache only, not in users' folders."""
    if sha256_prefix and not (digest := (_digest_once if cached else _digest)(path)).startswith(sha256_prefix.lower()):
        way_out = "; delete it and run again" if cached else ""
        if guessed:
            way_out += f"; if {sha256_prefix} in its name is no hash, give its path instead of the URL"
        raise UserError(f"{path} has sha256 {digest[:8]}... instead of {sha256_prefix}: it is damaged or another file{way_out}")
    return path


@contextlib.contextmanager
def _one_process_at_a_time(target: pathlib.Path) -> Iterator[None]:
    lock = target.with_name(target.name + ".lock")
    with lock.open("w") as handle:
        if fcntl is not None:
            with contextlib.suppress(OSError):  # some network file systems know no locks
                fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    # Only after success: whoever opens a new lock from here on finds the file and downloads nothing.
    lock.unlink(missing_ok=True)


def _download(wanted: Wanted, target: pathlib.Path) -> None:
    """The file at `target`, complete and checked, from the first of the URLs that gives it; or a UserError."""
    part = target.with_name(target.name + ".part")
    failures = []
    for url in wanted.urls:
        reason: object = None
        for _ in range(5):
            before = part.stat().st_size if part.exists() else 0
            try:
                _receive(url, part)
                return _accept(part, target, wanted, url)
            except PermissionError:
                raise
            except UserError as error:  # another file, or an unsafe redirection: the next address may do better
                if url == wanted.urls[-1]:
                    raise
                log.warning(f"warning: {error}")
                reason = "refused"
                break
            except (OSError, http.client.HTTPException) as error:
                reason = error
            if isinstance(reason, urllib.error.HTTPError) and reason.code == 416:  # nothing after `before`: start anew
                part.unlink(missing_ok=True)
            elif not part.exists() or part.stat().st_size <= before:
                break  # no progress: asking again would not help
        failures.append(f"{url} ({reason})")
    raise UserError(f"cannot download {', nor '.join(failures)}; download it elsewhere, put it at {target} and run again")


def _receive(url: str, part: pathlib.Path) -> None:
    """Write what `url` gives to `part`, after what an earlier call for the same file has left there."""
    note = part.with_name(part.name + ".from")  # which file the part is of, and its version (ETag or date)
    address = url.split("?")[0]  # signatures change, the file does not
    known, _, version = note.read_text().partition("\n") if note.exists() else (address, "", "")
    start = part.stat().st_size if part.exists() and known == address else 0
    headers = {"User-Agent": "beit-model-zoo", **({"Range": f"bytes={start}-"} if start else {})}
    if start and version:
        headers["If-Range"] = version  # a file that has changed since comes whole
    log.info(f"downloading {address} to {part.parent}" + (f" from byte {start} on" if start else ""))
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=30) as reply:
        _refuse_unsafe(reply.url)  # after redirections
        if reply.status != 206:
            start = 0
            tag = reply.headers.get("ETag", "W/")
            note.write_text(f"{address}\n{reply.headers.get('Last-Modified', '') if tag.startswith('W/') else tag}")
        length = reply.headers.get("Content-Length")
        total = int(length) + start if length else None
        bar = tqdm(total=total, initial=start, unit="B", unit_scale=True, desc=part.stem, file=sys.stderr, disable=None)
        with part.open("ab" if start else "wb") as file, bar:
            while chunk := reply.read(1 << 20):
                bar.update(file.write(chunk))
    if total is not None and part.stat().st_size != total:
        raise ConnectionError(f"the connection broke off after {part.stat().st_size} of {total} bytes")


def _accept(part: pathlib.Path, target: pathlib.Path, wanted: Wanted, url: str) -> None:
    part.with_name(part.name + ".from").unlink(missing_ok=True)
    if (prefix := wanted.sha256_prefix) is None:
        os.replace(part, target)
        return
    version, digest = _version(part), _digest(part)
    if digest.startswith(prefix.lower()):
        os.replace(part, target)
        _take_note(target, version, digest)
        return
    came = f"what came from {url} has sha256 {digest[:8]}... instead of {prefix}"
    if wanted.guessed:
        kept = target.with_name(f"unchecked_{target.name}")
        os.replace(part, kept)
        raise UserError(f"{came}, as in its name; if that is no hash, use what came: it is kept as {kept}")
    part.unlink()
    raise UserError(f"{came} and was deleted; run again, or put the right file at {target}")


# ----------------------------------------------------------------------------------------------------------------- table
PURPOSES = {
    "tokenizer": "gives BEiT v2 pretraining its targets: --tokenizer_model NAME --tokenizer_weight NAME; usage of the codebook",
    "tokenizer-v1": "gives BEiT v1 pretraining its targets: --tokenizer_model dall-e --tokenizer_weight NAME",
    "pretrained": "without labels: to fine-tune (--finetune NAME), probe, or pretrain on (--resume NAME)",
    "intermediate": "fine-tuned on ImageNet-21k's 21,841 classes: to fine-tune on (--finetune NAME)",
    "finetuned": "ImageNet-1k classifiers; accuracies in percent: to use or evaluate (--eval --finetune NAME)",
    "segmentation": "ADE20K's 150 classes; mIoU in percent",
}


def table() -> str:
    """The published weights by purpose: name, millions of parameters, about how large the download is, size on this
    machine's disk, published results."""
    lines = []
    for kind, purpose in PURPOSES.items():
        lines += [f"{kind}: {purpose}", f"  {'name':44}{'params':>8}{'download':>11}{'cached':>10}  published"]
        for name, entry in ENTRIES.items():
            if entry.kind == kind:
                params = f"{entry.params:.1f} M" if entry.params else "-"
                download = f"~{_size(entry.params * 1e6 * 4)}" if entry.params else "-"  # of fp32
                published = ", ".join(f"{metric} {value:g}" for metric, value in entry.metrics.items())
                lines.append(f"  {name:44}{params:>8}{download:>11}{_cached_size(entry):>10}  {published or '-'}")
        lines.append("")
    return "\n".join([*lines, f"Downloads go to {_cache_folder()}; TORCH_HOME moves it."])


def _cached_size(entry: Entry) -> str:
    path = _cache_folder() / entry.name
    return _size(path.stat().st_size) if path.is_file() else "-"


def _size(n_bytes: float) -> str:
    return f"{n_bytes / 2**20:.0f} MiB" if n_bytes < 2**30 else f"{n_bytes / 2**30:.1f} GiB"


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="List the published weights, or download some of them.")
    parser.add_argument("names", nargs="*", metavar="NAME", help="weights to download; none: print the table")
    return parser


@tells_the_user
def main(argv: Sequence[str] | None = None) -> None:
    names = get_parser().parse_args(argv).names
    for name in names:
        pick(ENTRIES, name, "weights")
    for name in names:
        print(fetch(name))
    if not names:
        print(table())


if __name__ == "__main__":
    main()
