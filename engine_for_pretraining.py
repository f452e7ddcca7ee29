"""Masked image modelling: one step of BEiT and BEiT v2.

Shapes: B batch, N patches, K codes, M masked patches of the whole batch.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import distributed
import knn
import visualization
from distributed import Precision
from engine import evaluation_batches, samples_to_show, to_device
from metrics import RunningMeans, accuracy
from run_state import Stage


class PretrainingStage(Stage):
    """Predict the frozen tokenizer's code of every masked patch, once or (with the CLS head) twice."""

    def __init__(
        self,
        tokenizer: Any,
        n_codes: int,
        device: torch.device,
        precision: Precision,
        dataset: Dataset,
        mean_std: tuple[Any, Any],
        held_out: DataLoader | None = None,
        knn_probe: knn.Probe | None = None,
    ) -> None:
        self.tokenizer, self.n_codes, self.device, self.precision = tokenizer, n_codes, device, precision
        self.dataset, self.mean_std, self.held_out = dataset, mean_std, held_out
        self.knn_probe = knn_probe
        self.code_counts = torch.zeros(n_codes, device=device)  # of this epoch's targets

    def step(self, model: nn.Module, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """Sum of the branches' cross-entropies over the masked patches (BEiT v2, section 3.2)."""
        codes = self.masked_codes(batch)
        outputs = model(batch["image"], batch["mask"])
        branches = outputs if isinstance(outputs, tuple) else (outputs,)
        losses = [F.cross_entropy(logits.float(), codes) for logits in branches]
        logs = {f"mlm_acc{suffix(i, branches)}": accuracy(logits, codes) for i, logits in enumerate(branches)}
        if len(branches) > 1:
            logs |= {f"loss{suffix(i, branches)}": loss for i, loss in enumerate(losses)}
        if model.training:
            self.code_counts.index_add_(0, codes, torch.ones_like(codes, dtype=torch.float32))
        return torch.stack(losses).sum(), logs

    @torch.no_grad()
    def masked_codes(self, batch: dict[str, Any]) -> Tensor:
        """The visual tokens of the masked patches, (M,) int64 in row-major order."""
        codes = self.tokenizer.get_codebook_indices(batch["tokenizer_image"])
        positions = batch["mask"].flatten().nonzero().squeeze(1)  # on the host: no synchronisation
        return codes.flatten().index_select(0, positions.to(codes.device, non_blocking=True))

    def start_epoch(self, epoch: int) -> None:
        self.code_counts.zero_()

    def end_epoch(self) -> dict[str, float]:
        """What a model that always says the commonest code would score: accuracy means something above that share."""
        counts = self.code_counts.clone()
        distributed.all_reduce_sum(counts)
        return {
            "majority_code_share": float(counts.max() / counts.sum().clamp(min=1)),
            "target_codes": int((counts > 0).sum()),
        }

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Loss and accuracy on held-out images (--eval_data_path), each with one fixed crop and mask."""
        if self.held_out is None:
            return {}
        model.eval()
        means = RunningMeans()
        for batch in evaluation_batches(self.held_out, self.device):
            with self.precision.autocast():
                loss, logs = self.step(model, batch)
            means.add({"loss": loss} | logs, weight=float(batch["mask"].sum()))
        return {f"test_{name}": value for name, value in means.read(over_all_ranks=True).items()}

    @torch.no_grad()
    def probe(self, model: Any, epoch: int) -> dict[str, float]:
        """k-NN accuracy of the student's last layer (--knn_freq): of its CLS token where that is trained, else of the mean."""
        probe, features = self.knn_probe, "cls" if hasattr(model, "cls_pt_layers") else "mean"
        if probe is None or not probe.due(epoch):
            return {}
        model.eval()

        def encode(images: Tensor) -> Tensor:
            with self.precision.autocast():
                return knn.pool(model.encode(images, None).float(), features)

        batches = [evaluation_batches(loader, self.device, "--knn_data_path") for loader in (probe.train, probe.validation)]
        train, own = (knn.extract(of_split, encode) for of_split in batches)
        return probe.measure(train, own, self.device)

    @torch.no_grad()
    def pictures(self, model: Any, count: int = 6) -> dict[str, Tensor]:
        """Each row: the image, what the model sees of it, the target tokens, and the target with its masked ones predicted."""
        samples = samples_to_show(self.dataset, count)
        if not samples:
            return {}
        model.eval()
        batch = {key: torch.stack([s[key] for s in samples]) for key in ("image", "tokenizer_image", "mask")}
        moved = to_device(batch, self.device)
        with self.precision.autocast():
            codes = self.tokenizer.get_codebook_indices(moved["tokenizer_image"]).cpu()
            outputs = model(moved["image"], batch["mask"])
        logits = outputs[0] if isinstance(outputs, tuple) else outputs
        predicted = codes.clone()
        predicted[batch["mask"]] = logits.argmax(dim=1).cpu()
        rows = []
        for image, mask, target, guess in zip(batch["image"], batch["mask"], codes, predicted, strict=True):
            grid = model.patch_embed.patch_shape
            shown = visualization.denormalise(image, *self.mean_std)
            hidden, size = mask.view(grid), image.shape[-2:]
            maps = [visualization.token_map(c.view(grid), self.n_codes, size) for c in (target, guess)]
            rows.append(visualization.side_by_side([shown, visualization.masked_image(shown, hidden), *maps]))
        return {"masked_tokens": visualization.stacked(rows)}

    def state_dict(self) -> dict[str, Any]:
        return {"code_counts": self.code_counts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if distributed.is_main():  # the saved counts are rank 0's share
            self.code_counts.copy_(state["code_counts"])


def suffix(index: int, branches: tuple[Tensor, ...]) -> str:
    """Published names: `mlm_acc` for one branch, `mlm_acc_1` and `mlm_acc_2` for main and CLS branch."""
    return f"_{index + 1}" if len(branches) > 1 else ""
