"""Linear probe: one linear classifier on every layer of a frozen backbone at once (BEiT
v1's protocol, after iGPT).

Shapes: B batch, L layers, D features of a layer (C channels, or 2C for CLS and mean).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data_pipeline.files import Key, SampleDataset, digest
from data_pipeline.samplers import Loader
from engine import Stage
from errors import UserError
from evaluation import knn
from evaluation.held_out import evaluation_batches
from runtime import distributed
from runtime.device import Precision
from runtime.metrics import accuracy, top_k_correct
from runtime.phases import FROZEN, phase


class LinearHeads(nn.Module):
    """Features (B, L, D) -> logits (L, B, classes). All that is trained, and all that a
    checkpoint holds.

    Before its classifier each channel of each layer is brought to mean 0 and variance 1
    (as by MAE's batch norm without parameters), by statistics of the training images
    taken once: `mean` and `std` (L, D). Raw outputs differ in scale from layer to
    layer, and from channel to channel by orders of magnitude. Batch norm would see
    other statistics on every rank; a fixed one is the same everywhere, and a resumed
    run has it from its checkpoint.

    `published`: as in BEiT v1's code instead: raw features, weights from N(0, 0.01),
    fp32.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, layers: int, dim: int, classes: int, published: bool = False) -> None:
        super().__init__()
        self.published = published
        self.register_buffer("mean", torch.zeros(layers, dim))
        self.register_buffer("std", torch.ones(layers, dim))
        self.heads = nn.ModuleList(nn.Linear(dim, classes) for _ in range(layers))
        for parameter in self.parameters():
            nn.init.zeros_(parameter)  # each classifier is a convex problem: no symmetry to break
            if published and parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.01)

    def forward(self, features: Tensor) -> Tensor:
        features = (features.float() - self.mean) / self.std
        in_fp32 = torch.autocast(features.device.type, enabled=False)
        with in_fp32 if self.published else contextlib.nullcontext():
            return torch.stack([head(features[:, layer]) for layer, head in enumerate(self.heads)])

    @torch.no_grad()
    def standardize_by(self, features: Iterable[Tensor]) -> None:
        """Take mean and variance from this and the other ranks' features, batches of
        (B, L, D).
        """
        sums = self.mean.new_zeros((2, *self.mean.shape), dtype=torch.float64)
        count = self.mean.new_zeros(1, dtype=torch.float64)
        for batch in features:
            batch = batch.to(self.mean.device, torch.float64)
            sums += torch.stack((batch.sum(dim=0), batch.square().sum(dim=0)))
            count += len(batch)
        distributed.all_reduce_sum(sums, count)
        mean, square = sums / count
        self.mean.copy_(mean)
        self.std.copy_(knn.channel_std(mean, square - mean.square()))


class CachedFeatures(SampleDataset):
    """Features that were computed before (knn.Features), as samples: {"image": (L, D),
    "label", "index", "failed"}.
    """

    def __init__(self, features: knn.Features) -> None:
        self.features = features

    def __len__(self) -> int:
        return len(self.features)

    def digest(self, root: str) -> str:
        """Of the labels alone, in no order: who computed a feature depends on the
        number of processes.
        """
        return digest([bytes(str(self.features.labels.bincount().tolist()), "ascii")])

    def __getitem__(self, key: Key) -> dict[str, Any]:
        index = key[1]
        label = int(self.features.labels[index])
        return {"image": self.features.values[index], "label": label, "index": index, "failed": []}


class LinearStage(Stage):
    """Cross-entropy of every layer's classifier. `encode` makes features of images: the
    backbone, or nothing if cached.

    `source` says whose features these are (file, pooling): a run goes on with the same
    ones only.
    """

    def __init__(
        self,
        encode: Callable[[Tensor], Tensor],
        device: torch.device,
        precision: Precision,
        validation: Loader,
        source: dict[str, str],
    ) -> None:
        super().__init__(device, precision)
        self.encode = encode
        self.validation, self.source = validation, source

    def step(self, model: nn.Module, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """The sum over the layers: no classifier's gradient depends on how many others
        there are.
        """
        with phase(FROZEN):
            features = self.encode(batch["image"])
        logits, labels = model(features).float(), batch["label"]
        losses = torch.stack([F.cross_entropy(layer_logits, labels) for layer_logits in logits])
        return losses.sum(), {
            "loss_last_layer": losses[-1],
            "class_acc_last_layer": accuracy(logits[-1], labels),
        }

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Top-1 accuracy of each layer in percent; `test_layer` (from 1) is the best
        one, of which the other figures are.

        The best layer is chosen on the validation images themselves, as in BEiT v1's
        paper.
        """
        model.eval()
        layers = len(model.heads)  # type: ignore[arg-type]
        # loss, top 1, top 5
        sums, images = torch.zeros(layers, 3, device=self.device), torch.zeros(1, device=self.device)
        for batch in evaluation_batches(self.validation, self.device):
            labels = batch["label"]
            features = self.encode(batch["image"])
            with self.precision.autocast():
                logits = model(features)
            for layer, layer_logits in enumerate(logits.float()):
                loss = F.cross_entropy(layer_logits, labels, reduction="sum")
                sums[layer] += torch.stack((loss, *(top_k_correct(layer_logits, labels, k) for k in (1, 5))))
            images += len(labels)
        distributed.all_reduce_sum(sums, images)
        loss, acc1, acc5 = (sums / images.clamp(min=1)).T.tolist()
        best = max(range(layers), key=lambda layer: acc1[layer])
        results = {"test_loss": loss[best], "test_acc1": 100 * acc1[best], "test_acc5": 100 * acc5[best]}
        results |= {"test_layer": best + 1, "test_images": int(images)}
        return results | {f"test_acc1_layer{layer + 1}": 100 * value for layer, value in enumerate(acc1)}

    def best_metric(self, test: dict[str, float]) -> float | None:
        return test.get("test_acc1")

    def state_dict(self) -> dict[str, Any]:
        return self.source

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for flag, value in self.source.items():
            if state.get(flag) != value:
                raise UserError(
                    f"the checkpoint's classifiers were trained with {flag} {state.get(flag)}, not {value}: "
                    "name another `output_dir`, or `no_auto_resume`"
                )
