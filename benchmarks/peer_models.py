"""BEiT of other libraries with our weights: timm's in this process, transformers' in
its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from torch import Tensor

from benchmarks.timing import Contender, Turn
from checkpoint_io.huggingface_format import CLASSIFIER, make_huggingface_config, to_huggingface
from checkpoint_io.timm_format import TIMM_ARGS, to_timm
from errors import UserError
from modeling_finetune import VisionTransformer
from vit_backbone import Trunk

WORKER = Path(__file__).with_name("worker.py")
# What runtime.device.keep_freed_memory does for this process, for that of transformers.
KEEP_FREED_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(1 << 30), "MALLOC_TRIM_THRESHOLD_": str((1 << 31) - 1)}


class Settings(NamedTuple):
    """What a fine-tuning step depends on, besides model and batch."""

    device: torch.device
    dtype: torch.dtype | None  # of autocast
    optimizer: dict[str, Any]
    clip_grad: float


def constructor_args(model: Trunk) -> dict[str, Any]:
    """Arguments of VisionTransformer for a model with a bias table per block and mean
    pooling.
    """
    block = model.blocks[0]
    return {
        "img_size": model.patch_embed.img_size,
        "patch_size": model.patch_size,
        "in_chans": 3,
        "num_classes": getattr(model, "num_classes", 0),
        "embed_dim": model.embed_dim,
        "depth": len(model.blocks),
        "num_heads": block.attn.num_heads,
        "mlp_ratio": block.mlp.fc1.out_features / model.embed_dim,
        "qkv_bias": True,
        "init_values": 0.1,
        "use_abs_pos_emb": False,
        "use_rel_pos_bias": True,
        "use_shared_rel_pos_bias": False,
        "use_mean_pooling": True,
    }


def timm_model(model: VisionTransformer) -> Any:
    """timm's Beit with our weights; of size base it is timm's
    beitv2_base_patch16_224.
    """
    from timm.models.beit import Beit

    settings = constructor_args(model)
    if (model.embed_dim, len(model.blocks), model.patch_embed.img_size) == (768, 12, (224, 224)):
        theirs: Any = timm.create_model(
            "beitv2_base_patch16_224", pretrained=False, num_classes=model.num_classes
        )
    else:
        theirs = Beit(
            **{name: settings[name] for name in TIMM_ARGS}, use_rel_pos_bias=True, global_pool="avg"
        )
    lacking = theirs.load_state_dict(to_timm(model.state_dict()).weights, strict=False).missing_keys
    if any(not key.endswith("relative_position_index") for key in lacking):
        raise RuntimeError(f"timm's model did not get {lacking}")
    return theirs


class Transformers(Contender):
    """BeitForImageClassification in a process that is idle between its turns.

    `kind`: step or infer.
    """

    def __init__(self, worker: Worker, kind: str) -> None:
        self.name, self.worker, self.kind = "transformers", worker, kind

    def turn(self, batch: Mapping[str, Any]) -> Turn:
        reply = self.worker.ask(do=self.kind)
        return Turn(reply["loss"], reply["ms"])

    def peak(self, batch: Mapping[str, Any]) -> int:
        return self.worker.ask(do="peak", of=self.kind)["bytes"]

    def close(self) -> None:
        self.worker.close()


class Worker:
    """The process of worker.py, to which commands go over a pipe."""

    def __init__(self, model: VisionTransformer, batch: Mapping[str, Tensor], settings: Settings) -> None:
        self.folder = tempfile.TemporaryDirectory()
        weights, kept = f"{self.folder.name}/weights.pt", f"{self.folder.name}/batch.pt"
        torch.save(to_huggingface(model.state_dict(), CLASSIFIER).weights, weights)
        torch.save({name: batch[name].cpu() for name in ("image", "label")}, kept)
        self.process = subprocess.Popen(
            [sys.executable, "-P", str(WORKER)],
            cwd=self.folder.name,
            env={**os.environ, **KEEP_FREED_MEMORY, "HF_HUB_OFFLINE": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self.ask(
            do="build",
            config=make_huggingface_config(constructor_args(model), CLASSIFIER, 0, 0.0, None),
            weights=weights,
            batch=kept,
            threads=torch.get_num_threads(),
            device=str(settings.device),
            dtype=settings.dtype and str(settings.dtype).removeprefix("torch."),
            optimizer=settings.optimizer,
            clip_grad=settings.clip_grad,
        )

    def ask(self, **command: Any) -> dict[str, Any]:
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps(command) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise UserError(
                f"transformers' process ended at '{command['do']}'; run python -P {WORKER} to see why"
            )
        reply: dict[str, Any] = json.loads(line)
        if "error" in reply:
            raise UserError(f"transformers' process: {reply['error']}")
        return reply

    def close(self) -> None:
        if self.process.poll() is None and self.process.stdin is not None:
            self.process.stdin.close()
            self.process.wait()
        self.folder.cleanup()
