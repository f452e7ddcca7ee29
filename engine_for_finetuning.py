"""Fine-tuning for classification: one step, and an evaluation that counts every image exactly once."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from timm.data import Mixup
from timm.loss import SoftTargetCrossEntropy
from torch import Tensor, nn
from torch.utils.data import DataLoader

import distributed
from distributed import Precision
from engine import evaluation_batches
from metrics import accuracy, top_k_correct
from run_state import Stage


class FinetuningStage(Stage):
    """Cross-entropy with label smoothing, or with mixed images and labels (mixup, cutmix)."""

    def __init__(
        self,
        device: torch.device,
        precision: Precision,
        validation: DataLoader | None = None,
        mixup: Mixup | None = None,
        smoothing: float = 0.0,
    ) -> None:
        self.device, self.precision, self.validation = device, precision, validation
        self.mixup, self.smoothing = mixup, smoothing
        self.soft_cross_entropy = SoftTargetCrossEntropy()

    def step(self, model: nn.Module, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        images, labels = batch["image"], batch["label"]
        if self.mixup is not None and len(images) > 1:
            even = len(images) // 2 * 2  # timm mixes pairs
            images, targets = self.mixup(images[:even], labels[:even])
            logits = model(images).float()
            return self.soft_cross_entropy(logits, targets), {"class_acc": accuracy(logits, targets)}
        logits = model(images).float()
        loss = F.cross_entropy(logits, labels, label_smoothing=self.smoothing)
        return loss, {"class_acc": accuracy(logits, labels)}

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Top-1 and top-5 accuracy in percent, balanced accuracy (mean over classes) and loss on the validation images."""
        if self.validation is None:
            return {}
        model.eval()
        sums = torch.zeros(4, dtype=torch.float64, device=self.device)  # loss, top 1, top 5, images
        per_class = torch.zeros(0, device=self.device)
        for batch in evaluation_batches(self.validation, self.device):
            labels = batch["label"]
            with self.precision.autocast():
                logits = model(batch["image"]).float()
            if len(per_class) == 0:
                per_class = torch.zeros(2 * logits.shape[1], device=self.device)  # correct, then total, of each class
            loss = F.cross_entropy(logits, labels, reduction="sum")
            counts = [top_k_correct(logits, labels, 1), top_k_correct(logits, labels, 5), loss.new_tensor(len(labels))]
            sums += torch.stack([loss, *counts]).double()
            hit = (logits.argmax(dim=1) == labels).float()
            per_class.index_add_(0, labels, hit)
            per_class.index_add_(0, labels + logits.shape[1], torch.ones_like(hit))
        per_class = self.same_length(per_class)
        distributed.all_reduce_sum(sums, per_class)
        correct, total = per_class.chunk(2)
        seen = total > 0
        balanced = float((correct[seen] / total[seen]).mean()) if bool(seen.any()) else float("nan")
        loss_sum, top1, top5, images = sums.tolist()
        images = max(images, 1.0)
        return {
            "test_loss": loss_sum / images,
            "test_acc1": 100 * top1 / images,
            "test_acc5": 100 * top5 / images,
            "test_balanced_acc": 100 * balanced,
            "test_images": int(images),
        }

    def same_length(self, counts: Tensor) -> Tensor:
        """A rank without a single image must still take part in the sum."""
        longest = max(distributed.gather_objects(len(counts)))
        return torch.cat((counts, counts.new_zeros(longest - len(counts))))

    def better(self, test: dict[str, float]) -> float | None:
        return test.get("test_acc1")
