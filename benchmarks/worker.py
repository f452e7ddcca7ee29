"""transformers' BeitForImageClassification, which takes its turns on command in its own
process.

transformers looks for a package named `datasets` and would find our module of that
name. This file is therefore run in another folder with `python -P`, and loads timing.py
by its path. Commands come as lines of JSON on stdin, and each is answered with a line
on stdout: {"do": "build", ...}, {"do": "step"}, {"do": "infer"},
{"do": "peak", "of": "step"}.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def load_timing() -> Any:
    """The module beside this one, without the folder on the path."""
    spec = importlib.util.spec_from_file_location("timing", Path(__file__).with_name("timing.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["timing"] = module
    spec.loader.exec_module(module)
    return module


timing = load_timing()


class Peer:
    """The model with its optimizer, and the batch; both are read from files."""

    def __init__(self, command: dict[str, Any]) -> None:
        import transformers

        torch.set_num_threads(command["threads"])
        self.device = torch.device(command["device"])
        self.dtype = getattr(torch, command["dtype"]) if command["dtype"] else None
        settings = {
            key: value
            for key, value in command["config"].items()
            if key not in ("architectures", "torch_dtype")
        }
        self.model = load_classifier(
            transformers.BeitConfig(**settings), torch.load(command["weights"], weights_only=True)
        ).to(self.device)
        batch = torch.load(command["batch"], weights_only=True)
        self.images, self.labels = (batch[name].to(self.device) for name in ("image", "label"))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), fused=True, **command["optimizer"])
        self.clip_grad: float = command["clip_grad"]

    def autocast(self) -> Any:
        return torch.autocast(self.device.type, self.dtype or torch.bfloat16, enabled=self.dtype is not None)

    def step(self, mark: Any) -> Tensor:
        self.model.train()
        with self.autocast():
            loss = F.cross_entropy(self.model(self.images).logits.float(), self.labels)
        mark("forward")
        loss.backward()
        mark("backward")
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip_grad)
        self.optimizer.step()
        self.optimizer.zero_grad()
        mark("optimizer")
        return loss.detach()

    @torch.no_grad()
    def infer(self, mark: Any) -> Tensor:
        self.model.eval()
        with self.autocast():
            loss = F.cross_entropy(self.model(self.images).logits.float(), self.labels)
        mark("forward")
        return loss

    def turn(self, kind: str) -> dict[str, Any]:
        clock = timing.Clock(self.device)
        loss = getattr(self, kind)(clock.mark)
        ms = clock.read_ms()
        return {"loss": float(loss), "ms": ms}

    def peak(self, kind: str) -> dict[str, Any]:
        kept = timing.bytes_of(self.model, optimizer=self.optimizer)
        return {
            "bytes": kept + timing.peak_growth(self.device, lambda: getattr(self, kind)(lambda phase: None))
        }


def load_classifier(config: Any, weights: dict[str, Tensor]) -> Any:
    """The classifier with these weights, which have the hub's names.

    They are loaded by transformers itself, which knows the names of its own modules.
    """
    import transformers
    from safetensors.torch import save_file

    architecture: Any = transformers.BeitForImageClassification
    with tempfile.TemporaryDirectory() as folder:
        save_file(
            {key: value.contiguous() for key, value in weights.items()},
            f"{folder}/model.safetensors",
            {"format": "pt"},
        )
        config.save_pretrained(folder)
        model, info = architecture.from_pretrained(folder, output_loading_info=True)
    if info["missing_keys"] or info["unexpected_keys"]:
        raise RuntimeError(f"transformers did not take these weights: {info}")
    return model


def answer(command: dict[str, Any], peers: list[Peer]) -> dict[str, Any]:
    if command["do"] == "build":
        peers.append(Peer(command))
        return {"attention": str(getattr(peers[0].model.config, "_attn_implementation", ""))}
    return peers[0].peak(command["of"]) if command["do"] == "peak" else peers[0].turn(command["do"])


def main() -> None:
    answers, sys.stdout = sys.stdout, sys.stderr  # what transformers prints must not be taken for an answer
    peers: list[Peer] = []
    for line in sys.stdin:
        try:
            reply = answer(json.loads(line), peers)
        except Exception as error:  # the asking process reports it
            reply = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(reply), file=answers, flush=True)


if __name__ == "__main__":
    main()
