"""Masked image modeling: one step of BEiT and BEiT v2, what a patch must predict, and
the ablations of that.

Above 300 lines, so that the step, its loss and its targets are in one file.

Shapes: B batch, N patches, P predicted patches of the whole batch (the masked ones, or
all B * N), M masked patches, C width, V values for each, K codes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from data_pipeline.files import SampleDataset
from data_pipeline.samplers import Loader
from engine import Stage
from errors import UserError
from evaluation import knn
from evaluation.held_out import average_steps, evaluation_batches, pick_samples
from layers.linear_cross_entropy import linear_cross_entropy
from layers.token_subset import MaskedPositions
from monitoring import alarms, health
from monitoring.alarms import Found, Line
from monitoring.health import HealthProbe, Look
from norm_ema_quantizer import perplexity
from runtime import distributed
from runtime.device import Precision, to_device
from runtime.phases import FROZEN, phase
from visualization import drawing


class PretrainingStage(Stage):
    """Predict the target of every masked patch, once or (with the CLS head) twice.

    Args:
        target: codes of a frozen tokenizer, or pixels.
        dataset: for pictures; `mean_std`: how its images are normalized.
        held_out: loader of `eval_data_path`.
        predict_all: the visible patches count in the loss too.
        nothing_masked: the masks are empty.
        knn_probe: k-NN every few epochs (`knn_freq`); `health_probe`: figures without
            labels (`health_freq`).
    """

    def __init__(
        self,
        target: Target,
        device: torch.device,
        precision: Precision,
        dataset: SampleDataset,
        mean_std: tuple[Any, Any],
        held_out: Loader | None = None,
        predict_all: bool = False,
        nothing_masked: bool = False,
        knn_probe: knn.Probe | None = None,
        health_probe: HealthProbe | None = None,
    ) -> None:
        super().__init__(device, precision)
        self.target = target
        self.dataset, self.mean_std, self.held_out = dataset, mean_std, held_out
        self.predict_all, self.nothing_masked = predict_all, nothing_masked
        self.knn_probe, self.health_probe = knn_probe, health_probe
        which = (
            "all patches, none of them masked"
            if nothing_masked
            else "all patches"
            if predict_all
            else "masked patches"
        )
        self.task = f"{target.name} of {which}"

    def step(self, model: nn.Module, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """Sum of the branches' losses over the predicted patches (BEiT v2, section
        3.2).
        """
        target = self.target.encode(batch, masked_only=not self.predict_all)

        def criterion(hidden: Tensor, head: nn.Linear) -> PatchLoss:
            return self.target.loss(hidden, head, target)

        # The model applies the criterion to each branch, inside its forward pass: DDP
        # and FSDP need the head there.
        masked = masked_positions(batch)
        outputs = model(batch["image"], masked, return_all_tokens=self.predict_all, criterion=criterion)
        branches = [outputs] if isinstance(outputs, PatchLoss) else list(outputs)  # main branch, CLS branch
        loss = torch.stack([branch.loss for branch in branches]).sum()
        logs: dict[str, Tensor] = {}
        for i, branch in enumerate(branches):
            accuracies = self.accuracies(branch.correct, masked)
            logs |= {f"{name}{suffix(i, branches)}": accuracy for name, accuracy in accuracies.items()}
        if len(branches) > 1:
            logs |= {f"loss{suffix(i, branches)}": branch.loss for i, branch in enumerate(branches)}
        if model.training:
            self.target.update_statistics(target)
        return loss, logs

    def accuracies(self, correct: Tensor | None, masked: MaskedPositions) -> dict[str, Tensor]:
        """`mlm_acc` is of the masked patches whatever is predicted, so that runs
        compare; `all_acc` of all patches.
        """
        if correct is None:
            return {}
        if not self.predict_all:
            return {"mlm_acc": correct.mean()}
        of_masked = {} if self.nothing_masked else {"mlm_acc": masked.select(correct).mean()}
        return of_masked | {"all_acc": correct.mean()}

    def start_epoch(self, epoch: int) -> None:
        self.target.start_epoch()

    def before_step(self, step: int) -> None:
        self.target.before_step()

    def end_epoch(self) -> dict[str, float]:
        return self.target.end_epoch()

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Loss and accuracy on held-out images (`eval_data_path`), each with one fixed
        crop and mask.
        """
        if self.held_out is None:
            return {}
        batches = evaluation_batches(self.held_out, self.device)
        return average_steps(self.step, model, batches, self.precision, self.predicted_patches)

    def predicted_patches(self, batch: dict[str, Any]) -> float:
        return float(batch["mask"].numel() if self.predict_all else batch["mask"].sum())

    def has_extra_metrics(self, epoch: int) -> bool:
        return any(probe and probe.is_due(epoch) for probe in (self.knn_probe, self.health_probe))

    @torch.no_grad()
    def extra_metrics(self, model: Any, epoch: int) -> dict[str, float]:
        model.eval()
        figures: dict[str, float] = {}
        if self.knn_probe and self.knn_probe.is_due(epoch):
            figures |= self.knn_figures(model, self.knn_probe)
        if self.health_probe and self.health_probe.is_due(epoch):
            figures |= self.health_figures(model, self.health_probe)
        return figures

    def knn_figures(self, model: Any, probe: knn.Probe) -> dict[str, float]:
        """k-NN accuracy of the student's last layer (`knn_freq`): of its CLS token
        where that is trained, else of the mean.
        """
        features = "cls" if has_cls_branch(model) else "mean"

        def encode(images: Tensor) -> Tensor:
            with self.precision.autocast():
                return knn.pool(model.encode(images, None).float(), features)

        batches = [
            evaluation_batches(loader, self.device, "`knn_data_path`")
            for loader in (probe.train, probe.validation)
        ]
        train, own = (knn.extract(of_split, encode) for of_split in batches)
        return probe.measure(train, own, self.device)

    def health_figures(self, model: Any, probe: HealthProbe) -> dict[str, float]:
        """`health_freq`: of the student's normalized tokens with nothing masked; and of
        the main branch's predictions of the masked patches, where it predicts codes.
        """
        n_codes = self.target.width if isinstance(self.target, Tokens) else 0

        def look(batch: dict[str, Any]) -> Look:
            with self.precision.autocast():
                tokens = model.norm(model.encode(batch["image"], None)).float()
                features = {name: knn.pool(tokens, name) for name in ("cls", "mean")}
                if not n_codes:
                    return Look(features)
                targets = self.target.encode(batch, masked_only=not self.nothing_masked)
                outputs = model(
                    batch["image"],
                    masked_positions(batch),
                    return_all_tokens=self.nothing_masked,
                    criterion=lambda hidden, head: head(hidden).argmax(dim=-1).flatten(),
                )
            return Look(features, targets, outputs[0] if has_cls_branch(model) else outputs)

        seen = probe.see(look, n_codes, self.device)
        figures = health.feature_figures(seen.features)
        if n_codes:
            figures |= health.prediction_figures(seen)
        return figures | probe.attention_figures(model, self.device, self.precision)

    def find_alarms(self, line: Line, earlier: Sequence[Line], warmed_up: bool) -> Found:
        found = alarms.falling_rank("health_rank_mean", line, earlier)
        if "train_loss_2" in line:  # else no loss asks for the CLS token
            found |= alarms.falling_rank("health_rank_cls", line, earlier)
        if not isinstance(self.target, Tokens):
            return found
        n_codes, used = self.target.width, line["train_target_codes"]
        evenness = line["train_target_perplexity"]
        found |= alarms.target_codes(used, evenness, n_codes)
        if warmed_up:
            names = ("loss_1", "loss_2") if "train_loss_2" in line else ("loss",)
            losses = {name: line[f"train_{name}"] for name in names}
            found |= alarms.flat_loss(losses, evenness, n_codes)
        if warmed_up and "health_mlm_margin" in line:
            predicted, targets = line["health_perplexity_predicted"], line["health_perplexity_target"]
            found |= alarms.predicted_codes(predicted, targets)
        return found

    @torch.no_grad()
    def pictures(self, model: Any, count: int = 6) -> dict[str, Tensor]:
        """Each row: the image, what the model sees of it, then the target's own: token
        maps before and after, or pixels; with captions.
        """
        samples = pick_samples(self.dataset, count)
        if not samples:
            return {}
        model.eval()
        names = {"image", "tokenizer_image", "mask"} & samples[0].keys()
        batch: dict[str, Any] = {name: torch.stack([sample[name] for sample in samples]) for name in names}
        moved = to_device(batch, self.device)
        with self.precision.autocast():
            targets = self.target.encode(moved)
            outputs = model(moved["image"], moved["mask"], return_all_tokens=self.predict_all)
            predictions = self.target.decode(
                (outputs[0] if isinstance(outputs, tuple) else outputs).flatten(0, -2)
            )
        predicted = targets.clone()
        predicted[slice(None) if self.predict_all else batch["mask"].flatten().to(predicted.device)] = (
            predictions
        )
        rows, grid = [], model.patch_embed.patch_shape
        per_image = (part.cpu().unflatten(0, (len(samples), -1)) for part in (targets, predicted))
        for image, mask, target, predicted_targets in zip(
            batch["image"], batch["mask"], *per_image, strict=True
        ):
            shown = drawing.enlarge(drawing.as_rgb(drawing.denormalize(image, *self.mean_std)))
            seen = drawing.masked_image(shown, mask.view(grid))
            own = self.target.pictures(target, predicted_targets, grid, shown.shape[-2:])
            judged = slice(None) if self.predict_all else mask.flatten()
            captions = self.target.captions(target[judged], predicted_targets[judged])
            tiles = zip([shown, seen, *own], ["image", "masked", *captions], strict=True)
            rows.append(
                drawing.side_by_side([drawing.add_caption(*tile, drawing.LARGE_CAPTION) for tile in tiles])
            )
        return {f"masked_{self.target.name}": drawing.stack_rows(rows)}

    def state_dict(self) -> dict[str, Any]:
        return self.target.state_dict() | {"task": self.task}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state.get("task", self.task) != self.task:
            raise UserError(
                f"the checkpoint was trained on the {state['task']}, this run is on the {self.task}: go on "
                "with the same `target`, `predict` and `no_mask`, or give this run an `output_dir` of its "
                "own"
            )
        self.target.load_state_dict(state)


def masked_positions(batch: dict[str, Any]) -> MaskedPositions:
    """Of a batch on the device; listed by its loader (`collate`), or here."""
    return MaskedPositions.of(batch["mask"], batch["image"].device, batch.get("masked"))


def has_cls_branch(model: nn.Module) -> bool:
    return hasattr(model, "cls_pt_layers")


def suffix(index: int, branches: list[PatchLoss]) -> str:
    """Published names: `mlm_acc` for one branch, `mlm_acc_1` and `mlm_acc_2` for main
    and CLS branch.
    """
    return f"_{index + 1}" if len(branches) > 1 else ""


# ── Targets ──


class PatchLoss(NamedTuple):
    """The loss of one branch over the predicted patches."""

    loss: Tensor  # () mean
    # (P,) 1 where the prediction is the target, else 0; None where predictions are
    # values
    correct: Tensor | None


class Target:
    """What a patch must predict: its code (BEiT, BEiT v2) or, the ablation of BEiT's
    table 4, its pixels.
    """

    name: str  # for the log and for pictures
    width: int  # V

    def encode(self, batch: dict[str, Any], masked_only: bool = False) -> Tensor:
        """A batch on the device (its mask on the host) -> the targets of every patch,
        (B * N, ...), images one after the other, row-major; or of the masked patches
        alone (M, ...).
        """
        raise NotImplementedError

    def loss(self, hidden: Tensor, head: nn.Linear, target: Tensor) -> PatchLoss:
        """Of the normalized tokens (P, C) or (B, N, C), the prediction head, and the
        targets of those P patches.
        """
        raise NotImplementedError

    def networks(self) -> list[Any]:
        """The frozen networks that it computes with."""
        return []

    def decode(self, prediction: Tensor) -> Tensor:
        """Predictions (P, V) as values of the same kind as the targets."""
        raise NotImplementedError

    def update_statistics(self, target: Tensor) -> None:
        """Count the targets of a training step."""

    def start_epoch(self) -> None:
        """Reset the counts."""

    def before_step(self) -> None:
        """Outside the step, where the host may wait for the device."""

    def end_epoch(self) -> dict[str, float]:
        """The epoch's statistics, for log.txt."""
        return {}

    def pictures(
        self, target: Tensor, predicted: Tensor, grid: tuple[int, int], size: Sequence[int]
    ) -> list[Tensor]:
        """One image's targets (N, ...), and the same with the predictions in their
        places, as pictures of `size`.
        """
        raise NotImplementedError

    def captions(self, target: Tensor, predicted: Tensor) -> list[str]:
        """Of those pictures, from what was to be predicted and what was."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Undo state_dict."""


class Tokens(Target):
    """The frozen tokenizer's code of each patch, by cross-entropy over the K codes.

    `channels`: those of the images that the tokenizer sees; None: all.
    """

    name = "tokens"

    def __init__(
        self, tokenizer: Any, n_codes: int, device: torch.device, channels: Sequence[int] | None = None
    ) -> None:
        self.tokenizer, self.width = tokenizer, n_codes
        self.channels = None if channels is None else torch.tensor(channels, device=device)
        self.code_counts = torch.zeros(n_codes, device=device)  # of this epoch's targets

    @torch.no_grad()
    def encode(self, batch: dict[str, Any], masked_only: bool = False) -> Tensor:
        images = batch["tokenizer_image"]
        if self.channels is not None:
            images = images.index_select(1, self.channels)
        masked = masked_positions(batch) if masked_only else None
        with phase(FROZEN):
            return self.tokenizer.get_codebook_indices(images, masked).flatten()

    def networks(self) -> list[Any]:
        return [self.tokenizer]

    def loss(self, hidden: Tensor, head: nn.Linear, target: Tensor) -> PatchLoss:
        loss, preds = linear_cross_entropy(hidden.flatten(0, -2), head, target)
        return PatchLoss(loss, (preds == target).float())

    def decode(self, prediction: Tensor) -> Tensor:
        return prediction.argmax(dim=1)

    def update_statistics(self, target: Tensor) -> None:
        self.code_counts.index_add_(0, target, torch.ones_like(target, dtype=torch.float32))

    def start_epoch(self) -> None:
        self.code_counts.zero_()

    def end_epoch(self) -> dict[str, float]:
        """`majority_code_share`: the accuracy of always predicting the most frequent
        code, the baseline of `mlm_acc`; how many codes were targets, and the
        perplexity of that.
        """
        counts = self.code_counts.clone()
        distributed.all_reduce_sum(counts)
        return {
            "majority_code_share": float(counts.max() / counts.sum().clamp(min=1)),
            "target_codes": int((counts > 0).sum()),
            "target_perplexity": perplexity(counts.double()),
        }

    def pictures(
        self, target: Tensor, predicted: Tensor, grid: tuple[int, int], size: Sequence[int]
    ) -> list[Tensor]:
        return [drawing.token_map(codes.view(grid), self.width, size) for codes in (target, predicted)]

    def captions(self, target: Tensor, predicted: Tensor) -> list[str]:
        right = int((target == predicted).sum())
        return ["target codes", f"predicted {right}/{len(target)}"]

    def state_dict(self) -> dict[str, Any]:
        counts = self.code_counts.clone()
        distributed.all_reduce_sum(counts)
        return {"code_counts": counts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if distributed.is_main():  # those of all ranks
            self.code_counts.copy_(state["code_counts"])


class Pixels(Target):
    """The patch's pixels as the network would see them, normalized by mean and std:
    mean squared error, no tokenizer.

    The V = in_chans * patch_size ** 2 values of a patch are in the order of the patch
    embedding's weights: channel, row, column.
    """

    name = "pixels"

    def __init__(
        self, patch_size: int, mean_std: tuple[Sequence[float], Sequence[float]], in_chans: int = 3
    ) -> None:
        self.patch_size, self.mean_std, self.in_chans = patch_size, mean_std, in_chans
        self.width = in_chans * patch_size**2

    def encode(self, batch: dict[str, Any], masked_only: bool = False) -> Tensor:
        side = self.patch_size
        pixels = rearrange(batch["image"], "b c (h row) (w col) -> (b h w) (c row col)", row=side, col=side)
        return masked_positions(batch).select(pixels) if masked_only else pixels

    def loss(self, hidden: Tensor, head: nn.Linear, target: Tensor) -> PatchLoss:
        return PatchLoss(F.mse_loss(head(hidden).flatten(0, -2).float(), target), None)

    def decode(self, prediction: Tensor) -> Tensor:
        return prediction.float()

    def pictures(
        self, target: Tensor, predicted: Tensor, grid: tuple[int, int], size: Sequence[int]
    ) -> list[Tensor]:
        """The image with the predicted patches pasted into it; its targets are the
        image itself.
        """
        side = self.patch_size
        image = rearrange(
            predicted,
            "(h w) (c row col) -> c (h row) (w col)",
            h=grid[0],
            c=self.in_chans,
            row=side,
            col=side,
        )
        shown = drawing.as_rgb(drawing.denormalize(image, *self.mean_std))
        return [drawing.stretch(shown, size)]

    def captions(self, target: Tensor, predicted: Tensor) -> list[str]:
        return ["predicted pixels"]
