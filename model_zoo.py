"""Weights by name, path or URL: find them, download them once, check them, read them without running any code.

`python model_zoo.py` prints the published weights with the accuracy that was published for each;
`python model_zoo.py NAME ...` downloads them (say, on a login node) and prints where they lie.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import hashlib
import http.client
import io
import logging
import os
import pathlib
import pickletools
import re
import sys
import urllib.error
import urllib.parse
import urllib.request
import warnings
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import safetensors.torch
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
    metrics: Mapping[str, float] = field(default_factory=dict)  # percent; codebook_usage is a share, loss is a loss

    @property
    def urls(self) -> list[str]:
        return [self.file] if "://" in self.file else [mirror + self.file for mirror in MIRRORS]


CLASSES = {"intermediate": 21841, "finetuned": 1000, "segmentation": 150}  # of the heads in the files


def _entry(name: str, kind: str, sha256_prefix: str | None = None, **metrics: float) -> Entry:
    """The row of a published name: its file and the builder it fits follow from the name."""
    folder = "v1.0" if name.startswith("beit_") else "BEiT-v2"
    model = name.split("_pt")[0].replace("beitv2", "beit")
    if kind == "pretrained":
        model += "_8k_vocab" if folder == "v1.0" else "_8k_vocab_cls_pt"
    file = f"{folder}/{name}-{sha256_prefix}.pth" if sha256_prefix else f"{folder}/{name}.pth"
    return Entry(file, kind, "" if kind == "segmentation" else model, CLASSES.get(kind), sha256_prefix, metrics)


ROWS: list[tuple[str, str, dict[str, Any]]] = [
    ("vqkd_encoder_base_decoder_1x768x12_clip", "tokenizer", {"sha256_prefix": "d93179da", "codebook_usage": 1.0}),
    ("vqkd_encoder_base_decoder_3x768x12_clip", "tokenizer", {"sha256_prefix": "d5036aa7", "codebook_usage": 0.97}),
    ("vqkd_encoder_base_decoder_1x768x12_dino", "tokenizer", {"sha256_prefix": "663c55d7", "codebook_usage": 1.0}),
    ("beitv2_base_patch16_224_pt1k_300e", "pretrained", {}),
    ("beitv2_base_patch16_224_pt1k", "pretrained", {}),
    ("beitv2_large_patch16_224_pt1k_300e", "pretrained", {}),
    ("beitv2_large_patch16_224_pt1k", "pretrained", {}),
    ("beitv2_base_patch16_224_pt1k_ft21k", "intermediate", {}),
    ("beitv2_large_patch16_224_pt1k_ft21k", "intermediate", {}),
    ("beitv2_base_patch16_224_pt1k_300e_ft1k", "finetuned", {"top1": 85.0}),
    ("beitv2_base_patch16_224_pt1k_ft1k", "finetuned", {"top1": 85.5, "top5": 97.5}),
    ("beitv2_base_patch16_224_pt1k_ft21kto1k", "finetuned", {"top1": 86.458, "top5": 97.978, "loss": 0.569}),
    ("beitv2_large_patch16_224_pt1k_300e_ft1k", "finetuned", {"top1": 86.6}),
    ("beitv2_large_patch16_224_pt1k_ft1k", "finetuned", {"top1": 87.3, "top5": 98.2}),
    ("beitv2_large_patch16_224_pt1k_ft21kto1k", "finetuned", {"top1": 88.37, "top5": 98.578, "loss": 0.493}),
    ("beitv2_base_patch16_224_pt1k_ftade20k", "segmentation", {"miou": 53.1}),
    ("beitv2_base_patch16_224_pt1k_ft21ktoade20k", "segmentation", {"miou": 53.5}),
    ("beitv2_large_patch16_224_pt1k_ftade20k", "segmentation", {"miou": 56.7}),
    ("beitv2_large_patch16_224_pt1k_ft21ktoade20k", "segmentation", {"miou": 57.54, "macc": 68.78, "aacc": 86.22}),
    ("beit_base_patch16_224_pt22k", "pretrained", {}),
    ("beit_large_patch16_224_pt22k", "pretrained", {}),
    ("beit_base_patch16_224_pt22k_ft22k", "intermediate", {}),
    ("beit_large_patch16_224_pt22k_ft22k", "intermediate", {}),
    ("beit_base_patch16_224_pt22k_ft1k", "finetuned", {"top1": 83.7}),
    ("beit_base_patch16_224_pt22k_ft22kto1k", "finetuned", {"top1": 85.2}),
    ("beit_base_patch16_384_pt22k_ft22kto1k", "finetuned", {"top1": 86.82, "top5": 98.124, "loss": 0.565}),
    ("beit_large_patch16_224_pt22k_ft22kto1k", "finetuned", {"top1": 87.396, "top5": 98.282, "loss": 0.515}),
    ("beit_large_patch16_384_pt22k_ft22kto1k", "finetuned", {"top1": 88.408, "top5": 98.602, "loss": 0.479}),
    ("beit_large_patch16_512_pt22k_ft22kto1k", "finetuned", {"top1": 88.6, "top5": 98.658, "loss": 0.474}),
]
ENTRIES = {name: _entry(name, kind, **facts) for name, kind, facts in ROWS}
ENTRIES["dall_e_encoder"] = Entry("https://cdn.openai.com/dall-e/encoder.pkl", "tokenizer-v1")


# ------------------------------------------------------------------------------------------------------------- fetching
def fetch(source: str | os.PathLike[str], sha256_prefix: str | None = None) -> pathlib.Path:
    """The file behind `source`: an existing path, a name of ENTRIES, or a URL (https://, file://, http:// see below).

    A download goes to `checkpoints/` in torch.hub's folder (TORCH_HOME moves it), once, also when several processes ask
    at the same time; one that broke off is resumed. It must match `sha256_prefix`, or the prefix the zoo knows, or one
    in the file's name (`-d5036aa7.pth`). http:// is refused unless the host is this machine or BEIT_ALLOW_HTTP=1.
    UserError: nothing there, unreachable, another hash.
    """
    source = os.fspath(source)
    if os.path.isfile(here := os.path.expanduser(source)):  # pathlib's is_file fails on a URL longer than a file name
        return _checked(pathlib.Path(here), sha256_prefix)
    if source not in ENTRIES and "://" not in source:
        raise _no_such_file(source)
    urls, published_prefix = _addresses(source)
    parts = urllib.parse.urlsplit(urls[0])
    name = pathlib.PurePosixPath(urllib.parse.unquote(parts.path)).name
    if not name:
        raise UserError(f"{source} names no file: give the URL of the weights themselves")
    expected = sha256_prefix or published_prefix or _hash_in_name(name)
    if parts.scheme == "file":  # in place: under a cache's one name per file, two folders' checkpoint.pth would mix
        path = pathlib.Path(urllib.request.url2pathname(parts.path))
        if not path.is_file():
            raise UserError(f"{source}: there is no such file")
        return _checked(path, expected)
    target = pathlib.Path(torch.hub.get_dir()) / "checkpoints" / name
    if not target.exists():
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with _one_process_at_a_time(target):
                if not target.exists():
                    _download(urls, target, expected)
        except PermissionError as error:
            raise UserError(f"cannot write {target} ({error.strerror}); TORCH_HOME names another folder") from error
    return target


def _no_such_file(source: str) -> UserError:
    path = pathlib.Path(source).expanduser()
    if path.is_dir():
        return UserError(f"{source} is a folder: name the weight file in it")
    near = difflib.get_close_matches(path.name.removesuffix(path.suffix), ENTRIES, n=3, cutoff=0.6)
    offer = f"did you mean {' or '.join(near)}?" if near else "`python model_zoo.py` lists the names."
    return UserError(f"{source} is neither a file, nor a URL, nor a name of published weights; {offer}")


def _addresses(source: str) -> tuple[list[str], str | None]:
    """URLs to try in turn, and the published hash's prefix, for a name of ENTRIES or a URL."""
    if source in ENTRIES:
        return ENTRIES[source].urls, ENTRIES[source].sha256_prefix
    _refuse_unsafe(source)
    parts = urllib.parse.urlsplit(source)
    query = urllib.parse.parse_qs(parts.query)
    if "sv" in query and "sig" not in query:
        raise UserError(
            f"the URL {source} was cut at its first '&', and every flag after it was lost: the shell takes an unquoted "
            "'&' for the end of the command; put the whole URL in quotes"
        )
    if parts.hostname in FORMER_HOSTS:
        for entry in ENTRIES.values():
            if entry.file.rsplit("/", 1)[-1] == parts.path.rsplit("/", 1)[-1]:
                return [source, *entry.urls], entry.sha256_prefix
    return [source], None


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
    """`weights-d5036aa7.pth` -> d5036aa7, torch.hub's convention; a date such as -20240131.pth is no hash."""
    found = re.search(r"-(?!20[0-9]{6}\.)([0-9a-f]{8,64})\.", name)
    return found.group(1) if found else None


def _digest(path: pathlib.Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _checked(path: pathlib.Path, sha256_prefix: str | None) -> pathlib.Path:
    """`path`, the user's own file; with a prefix only if its hash begins with it."""
    if sha256_prefix and not (digest := _digest(path)).startswith(sha256_prefix.lower()):
        raise UserError(f"{path} has sha256 {digest[:8]}... instead of {sha256_prefix}: it is damaged or another file")
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


def _download(urls: Sequence[str], target: pathlib.Path, sha256_prefix: str | None) -> None:
    """The file at `target`, complete and checked, from the first of `urls` that gives it; or a UserError."""
    part = target.with_name(target.name + ".part")
    reason: Exception | None = None
    for url in urls:
        for _ in range(5):
            before = part.stat().st_size if part.exists() else 0
            try:
                _receive(url, part)
                return _accept(part, target, sha256_prefix, url)
            except PermissionError:
                raise
            except (OSError, http.client.HTTPException) as error:
                reason = error
            if isinstance(reason, urllib.error.HTTPError) and reason.code == 416:  # nothing after `before`: start anew
                part.unlink(missing_ok=True)
            elif not part.exists() or part.stat().st_size <= before:
                break  # no progress: asking again would not help
    raise UserError(f"cannot download {urls[0]} ({reason}); download it elsewhere, put it at {target} and run again")


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


def _accept(part: pathlib.Path, target: pathlib.Path, sha256_prefix: str | None, url: str) -> None:
    part.with_name(part.name + ".from").unlink(missing_ok=True)
    digest = _digest(part)
    if sha256_prefix and not digest.startswith(sha256_prefix.lower()):
        part.unlink()
        raise UserError(
            f"what came from {url} has sha256 {digest[:8]}... instead of {sha256_prefix} and was deleted; run again, "
            f"or put the right file at {target}"
        )
    os.replace(part, target)


# -------------------------------------------------------------------------------------------------------------- reading
def _harmless_globals() -> list[Any]:
    """What checkpoints hold besides tensors: flags, paths, numpy scalars and arrays under numpy 1's and 2's names."""
    scalar, reconstruct = np.float64(0).__reduce__()[0], np.zeros(1).__reduce__()[0]
    modules = ("numpy.core.multiarray", "numpy._core.multiarray")
    names = [(f, f"{module}.{f.__name__}") for module in modules for f in (scalar, reconstruct)]
    dtypes = {type(np.dtype(code)) for code in np.typecodes["All"] if code != "O"}
    paths = [(pathlib.PosixPath, f"{module}.PosixPath") for module in ("pathlib", "pathlib._local")]
    return [argparse.Namespace, np.ndarray, np.dtype, *names, *sorted(dtypes, key=str), *paths]


def load_file(path: str | os.PathLike[str], safe: Sequence[Any] = ()) -> Any:
    """What a weight file holds, on the CPU: safetensors, torch.save (new or old), TorchScript (its state dict).

    Python code pickled into a file is never run. `safe`: more globals a torch file may name, as
    `torch.serialization.safe_globals` takes them. UserError: not there, damaged, no weight file, or with code in it.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise UserError(f"{path}: there is no such file")
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        members: list[str] = []
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                members = archive.namelist()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch.jit is deprecated, but OpenAI's CLIP is a TorchScript archive
            if any(name.endswith("/constants.pkl") or "/code/" in name for name in members):
                return torch.jit.load(path, map_location="cpu").state_dict()
            # Only who expects a module (`safe`) needs the rewriting; it costs a copy of the file in memory.
            source = path if members or not safe else _with_classes_called(path)
            called = (_class_alone, f"{__name__}.{_class_alone.__name__}")
            with torch.serialization.safe_globals([*_harmless_globals(), called, *safe]):
                return torch.load(source, map_location="cpu", weights_only=True, mmap=True if members else None)
    except PermissionError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}; change its permissions") from error
    except Exception as error:  # a damaged file may fail in any way
        raise _unreadable(path, error) from error


def _class_alone(kind: str, cls: Any, file: str | None, source: str | None) -> Any:
    """The class in an old-format file's note about one: ("module", class, its source file, its source)."""
    return cls


def _with_classes_called(path: pathlib.Path) -> io.BytesIO:
    """An old-format file that torch can read with weights_only=True although a module was pickled in it.

    torch gives every module class the persistent id ("module", class, file, source) in this format, and refuses any such
    id when it may not run code, whatever globals are safe. Here each becomes the call `_class_alone("module", ...)`, of the
    same value: so torch's own rule decides about every class, as it does in the new format. Nothing is run here.
    """
    data = path.read_bytes()
    with io.BytesIO(data) as file:
        for _ in range(3):  # a magic number, the version, sizes of the writer's types; the fourth pickle is the content
            list(pickletools.genops(file))
        steps = list(pickletools.genops(file))
    texts: dict[Any, Any] = {}  # memo slot -> the string in it: "module" is written once, then taken from the memo
    pieces, end, mark = [], 0, 0
    for i, (code, argument, position) in enumerate(steps):
        if code.name == "MARK":
            mark = i
        elif "PUT" in code.name and steps[i - 1][0].name == "BINUNICODE":
            texts[argument] = steps[i - 1][1]
        elif code.name == "BINPERSID":  # of the tuple that began at the last mark
            first, kind, _ = steps[mark + 1]
            if (texts.get(kind) if "GET" in first.name else kind) == "module":
                start = steps[mark][2] or 0
                pieces += [data[end:start], f"c{__name__}\n{_class_alone.__name__}\n".encode(), data[start:position], b"R"]
                end = (position or 0) + 1
    return io.BytesIO(b"".join([*pieces, data[end:]]))


def _unreadable(path: pathlib.Path, error: Exception) -> UserError:
    code = re.search(r"GLOBAL ([\w.]+)", str(error))
    if code:
        return UserError(
            f"{path} holds Python objects ({code.group(1)}), which are not loaded because they can run any code; if "
            "you trust the file, keep only its tensors: "
            f"torch.save(torch.load('{path}', weights_only=False)['model'], 'clean.pth')"
        )
    why = (str(error).strip().splitlines() or [""])[0][:100]
    return UserError(
        f"{path} is no weight file or an incomplete one ({type(error).__name__}: {why}); delete it and get it again"
    )


def load_state_dict(source: str, keys: str = "model|module") -> dict[str, torch.Tensor]:
    """The tensors in `source` (see `fetch`) under the first of `keys` that it has, else `state_dict`, else its top."""
    return weights_in(load_file(fetch(source)), source, keys)


def plain_flags(args: Any) -> dict[str, Any]:
    """The flags in a checkpoint: a dictionary, the argparse Namespace of published files, or {}."""
    return dict(args) if isinstance(args, Mapping) else vars(args) if isinstance(args, argparse.Namespace) else {}


def weights_in(content: Any, source: str, keys: str = "model|module") -> dict[str, torch.Tensor]:
    """As load_state_dict, of a file that is read already; `source` is for the message."""
    found = content
    if isinstance(content, Mapping):
        inside = [key for key in (*keys.split("|"), "state_dict") if isinstance(content.get(key), Mapping)]
        found = content[inside[0]] if inside else content
    tensors = {k: v for k, v in found.items() if isinstance(v, torch.Tensor)} if isinstance(found, Mapping) else {}
    if not tensors:
        holds = ", ".join(map(str, list(content)[:8])) if isinstance(content, Mapping) else type(content).__name__
        raise UserError(f"{source} holds no weights under {keys}|state_dict nor at its top; it holds: {holds or 'nothing'}")
    return tensors


@tells_the_user
def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="List the published weights, or download some of them.")
    parser.add_argument("names", nargs="*", metavar="NAME", help="weights to download; none: print the table")
    names = parser.parse_args(argv).names
    for name in names:
        pick(ENTRIES, name, "weights")
    for name in names:
        print(fetch(name))
    for name, entry in () if names else ENTRIES.items():
        print(f"{name:46}{entry.kind:14}{', '.join(f'{k} {v:g}' for k, v in entry.metrics.items())}")


if __name__ == "__main__":
    main()
