"""Masked image modelling: one step of BEiT and BEiT v2, and of the ablations of what is predicted.

Shapes: B batch, N patches, P predicted patches of the whole batch (the masked ones, or all B * N), V values for each.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import knn
import visualization
from distributed import Precision
from engine import evaluation_batches, mean_of_steps, samples_to_show, to_device
from errors import UserError
from pretraining_targets import Judged, Target
from run_state import Stage
from vit_backbone import at_mask


class PretrainingStage(Stage):
    """Predict the target (pretraining_targets) of every masked patch, once or (with the CLS head) twice.

    Args:
        target: codes of a frozen tokenizer, or pixels.
        dataset: for pictures; `mean_std`: how its images are normalised.
        held_out: loader of --eval_data_path.
        predict_all: the visible patches count in the loss too.
        nothing_masked: the masks are empty.
        knn_probe: k-NN every few epochs (--knn_freq).
    """

    def __init__(
        self,
        target: Target,
        device: torch.device,
        precision: Precision,
        dataset: Dataset,
        mean_std: tuple[Any, Any],
        held_out: DataLoader | None = None,
        predict_all: bool = False,
        nothing_masked: bool = False,
        knn_probe: knn.Probe | None = None,
    ) -> None:
        self.target, self.device, self.precision = target, device, precision
        self.dataset, self.mean_std, self.held_out = dataset, mean_std, held_out
        self.predict_all, self.nothing_masked, self.knn_probe = predict_all, nothing_masked, knn_probe
        which = "all patches, none of them masked" if nothing_masked else "all patches" if predict_all else "masked patches"
        self.task = f"{target.name} of {which}"

    def step(self, model: nn.Module, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """Sum of the branches' losses over the predicted patches (BEiT v2, section 3.2)."""
        target = self.target.of(batch, masked_only=not self.predict_all)
        judge = functools.partial(self.target.judge, target=target)
        outputs = model(batch["image"], batch["mask"], return_all_tokens=self.predict_all, read=judge)
        branches = [outputs] if isinstance(outputs, Judged) else list(outputs)
        losses = [branch.loss for branch in branches]
        logs: dict[str, Tensor] = {}
        for i, branch in enumerate(branches):
            accuracies = self.accuracies(branch.right, batch["mask"])
            logs |= {f"{name}{suffix(i, branches)}": accuracy for name, accuracy in accuracies.items()}
        if len(branches) > 1:
            logs |= {f"loss{suffix(i, branches)}": loss for i, loss in enumerate(losses)}
        if model.training:
            self.target.count(target)
        return torch.stack(losses).sum(), logs

    def accuracies(self, right: Tensor | None, mask: Tensor) -> dict[str, Tensor]:
        """`mlm_acc` is of the masked patches whatever is predicted, so that runs compare; `all_acc` of all patches."""
        if right is None:
            return {}
        if not self.predict_all:
            return {"mlm_acc": right.mean()}
        of_masked = {} if self.nothing_masked else {"mlm_acc": at_mask(right, mask).mean()}
        return of_masked | {"all_acc": right.mean()}

    def start_epoch(self, epoch: int) -> None:
        self.target.start_epoch()

    def end_epoch(self) -> dict[str, float]:
        return self.target.end_epoch()

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Loss and accuracy on held-out images (--eval_data_path), each with one fixed crop and mask."""
        if self.held_out is None:
            return {}
        batches = evaluation_batches(self.held_out, self.device)
        return mean_of_steps(self, model, batches, self.precision, self.predicted_patches)

    def predicted_patches(self, batch: dict[str, Any]) -> float:
        return float(batch["mask"].numel() if self.predict_all else batch["mask"].sum())

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
        """Each row: the image, what the model sees of it, then the target's own: token maps before and after, or pixels."""
        samples = samples_to_show(self.dataset, count)
        if not samples:
            return {}
        model.eval()
        names = {"image", "tokenizer_image", "mask"} & samples[0].keys()
        batch: dict[str, Any] = {name: torch.stack([sample[name] for sample in samples]) for name in names}
        moved = to_device(batch, self.device)
        with self.precision.autocast():
            targets = self.target.of(moved)
            outputs = model(moved["image"], moved["mask"], return_all_tokens=self.predict_all)
            answer = self.target.answer((outputs[0] if isinstance(outputs, tuple) else outputs).flatten(0, -2))
        answered = targets.clone()
        answered[slice(None) if self.predict_all else batch["mask"].flatten().to(answered.device)] = answer
        rows, grid = [], model.patch_embed.patch_shape
        per_image = (part.cpu().unflatten(0, (len(samples), -1)) for part in (targets, answered))
        for image, mask, target, answers in zip(batch["image"], batch["mask"], *per_image, strict=True):
            shown = visualization.denormalise(image, *self.mean_std)
            seen = visualization.masked_image(shown, mask.view(grid))
            own = self.target.pictures(target, answers, grid, image.shape[-2:])
            rows.append(visualization.side_by_side([shown, seen, *own]))
        return {f"masked_{self.target.name}": visualization.stacked(rows)}

    def state_dict(self) -> dict[str, Any]:
        return self.target.state_dict() | {"task": self.task}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state.get("task", self.task) != self.task:
            raise UserError(
                f"the checkpoint was trained on the {state['task']}, this run is on the {self.task}: go on with the same "
                "--target, --predict and --no_mask, or give this run an --output_dir of its own"
            )
        self.target.load_state_dict(state)


def suffix(index: int, branches: list[Judged]) -> str:
    """Published names: `mlm_acc` for one branch, `mlm_acc_1` and `mlm_acc_2` for main and CLS branch."""
    return f"_{index + 1}" if len(branches) > 1 else ""
