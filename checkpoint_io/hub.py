"""Models of Hugging Face's hub: fetched by their id (`owner/name`, with `@revision`
where it is not `main`), and pushed to it. huggingface_hub keeps the cache (HF_HOME moves
it), the token and the address (HF_ENDPOINT).
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

from errors import UserError

WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")  # in the folders of Hugging Face and timm
CONFIGURATIONS = ("config.json", "preprocessor_config.json")
ID = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@([\w./-]+))?")
ENDINGS = (".pth", ".pt", ".bin", ".ckpt", ".pkl", ".pickle", ".safetensors", ".tar", ".npz", ".json")


def is_hub_id(source: str) -> bool:
    """Whether `source` may be an id of the hub: not where its first part is a folder
    here, or its end is that of a file.
    """
    return bool(
        ID.fullmatch(source)
        and not source.lower().endswith(ENDINGS)
        and not os.path.lexists(source.split("/")[0])
    )


def fetch_model(source: str) -> Path:
    """The weight file of the model `source` in huggingface_hub's cache, its
    configuration beside it. UserError: no such model, no weights in one file, or no way
    to the hub.
    """
    found = ID.fullmatch(source)
    assert found is not None, source
    name, revision = found.groups()
    try:
        paths = (_download(name, file, revision) for file in WEIGHT_FILES)
        path = next((path for path in paths if path is not None), None)
        for file in CONFIGURATIONS if path is not None else ():
            _download(name, file, revision)
    except Exception as error:  # of any of the libraries through which huggingface_hub downloads
        first = (str(error).strip().splitlines() or [""])[0]
        if isinstance(error, LocalEntryNotFoundError):
            first = "no connection, and it is not in the cache"
        raise UserError(
            f"{source} is no file here and no published name (`python model_zoo.py` lists these), and it "
            f"cannot be had from Hugging Face's hub ({type(error).__name__}: {first[:200]})"
        ) from None
    if path is None:
        raise UserError(
            f"{source}: this model of Hugging Face's hub has no {' or '.join(WEIGHT_FILES)}; download its "
            "weight file and give the path"
        )
    return path


def _download(name: str, file: str, revision: str | None) -> Path | None:
    """None where the model has no such file."""
    try:
        return Path(huggingface_hub.hf_hub_download(name, file, revision=revision))
    except LocalEntryNotFoundError:  # no way to the hub: whether there is one is not known
        if file in CONFIGURATIONS:
            return None
        raise
    except EntryNotFoundError:
        return None


def push_folder(folder: Path, files: Sequence[Path], name: str) -> str:
    """Upload `files` of the folder to the model repository `name`, which is made,
    private, where there is none; returns its address. UserError: not allowed, no token,
    or no way to the hub.
    """
    if not ID.fullmatch(name) or "@" in name:
        raise UserError(f"`push_to_hub` {name}: give the repository as owner/name")
    api = huggingface_hub.HfApi()
    try:
        url = api.create_repo(name, private=True, exist_ok=True)
        names = [str(path.relative_to(folder)) for path in files]
        api.upload_folder(
            repo_id=name, folder_path=folder, allow_patterns=names, commit_message="Export of a BEiT model"
        )
    except Exception as error:  # of any of the libraries through which huggingface_hub uploads
        first = (str(error).strip().splitlines() or [""])[0]
        raise UserError(
            f"`push_to_hub` {name}: the hub does not take it ({type(error).__name__}: {first[:200]}); the "
            f"files are in {folder}; `hf auth login` stores a token"
        ) from None
    return str(url)
