"""Tiny pretraining with and without the CLS head, for codes and for pixels."""

import pytest
import torch
from tiny_runs import SIZE, STUDENT, log_lines, pretraining_flags

import run_beitv2_pretraining
from engine_for_pretraining import PretrainingStage

NOWHERE = ["--data_path", "/nowhere"]
PLAIN = ["--model", "beit_demo_patch16_128_8k_vocab"]  # without the CLS head
BOTH = pytest.mark.parametrize("head", [[], PLAIN], ids=["cls head", "plain"])


def pretrain(data, out, codes, *more):
    run_beitv2_pretraining.main(pretraining_flags(data, out, codes, *more))
    return log_lines(out)


def pixel_flags(data, out, *more):
    """pretraining_flags without the tokenizer's: 2 of 2 x 2 patches are masked."""
    flags = ["--data_path", str(data), "--output_dir", str(out), "--target", "pixels", "--model", STUDENT]
    flags += ["--early_layers", "4", "--head_layers", "1", "--batch_size", "4", "--lr", "1e-3", *SIZE]
    return [*flags, "--num_mask_patches", "2", "--epochs", "2", "--warmup_epochs", "1", *more]


def spy_on_steps(monkeypatch):
    """What the stage's steps saw and gave: [(stage, batch, outputs of the model, loss,
    logs)], detached.
    """
    original, seen = PretrainingStage.step, []

    def spied(self, model, batch):
        with torch.random.fork_rng():  # the logits of the step to come, with the same dropped paths
            outputs = model(batch["image"], batch["mask"], return_all_tokens=self.predict_all)
        results = outputs if isinstance(outputs, tuple) else (outputs,)
        loss, logs = original(self, model, batch)
        seen.append((self, batch, [r.detach().clone() for r in results], loss.detach(), logs))
        return loss, logs

    monkeypatch.setattr(PretrainingStage, "step", spied)
    return seen
