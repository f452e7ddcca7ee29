"""Whether a checkpoint is of this run, and whether all processes are: their flags and
images compared, differences named.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import arguments
from errors import UserError
from runtime import distributed
from runtime.terminal import log

# Flags that say where and how often, not what is trained; data and seed are compared by themselves.
WITHOUT_EFFECT = {
    *"""
    output_dir log_dir device resume auto_resume start_epoch save_ckpt save_ckpt_freq
    save_ckpt_steps keep_ckpts detect_anomaly print_freq image_freq eval_freq num_workers
    pin_mem dist_url dist_timeout dist_on_itp data_path download allow_changed_run seed eval
    tta_flip robust_test worst_classes calculate_codebook_usage disable_eval
""".split(),
    *arguments.OBSOLETE,
}
# Flags that may differ from machine to machine of one run; of the paths, whether they
# are given must be the same.
PATHS = {
    *"""
    output_dir log_dir data_path eval_data_path knn_data_path image_folder_class_index_file resume
    finetune tokenizer_weight teacher_weight
    """.split()
}
OF_A_MACHINE = {"device", "num_workers", "pin_mem", "dist_url", *arguments.OBSOLETE}


def check_same_run(
    content: Mapping[str, Any], flags: Mapping[str, Any], data: Mapping[str, Any], path: Any
) -> None:
    """UserError where `content`, a checkpoint, is of other images or another seed and
    --allow_changed_run is not given; every other flag that changes the result is named,
    old -> new.

    flags: this run's, as plain data. data: `images`, how many, and `digest`, of their
    names. What a checkpoint of earlier code or of another code base does not tell is
    not compared.
    """
    theirs, before = content.get("args", {}), content.get("data")
    if isinstance(before, Mapping) and before and data:
        differences = []
        if before.get("digest") != data["digest"]:
            counts = (before.get("images"), data["images"])
            same = counts[0] == counts[1]
            differences.append(
                f"{counts[0]} images of other names" if same else f"{counts[0]} images, not {counts[1]}"
            )
        if theirs.get("seed", flags["seed"]) != flags["seed"]:
            differences.append(f"--seed {theirs['seed']}, not {flags['seed']}")
        if differences and not flags["allow_changed_run"]:
            raise UserError(
                f"{path} is of a run on {' and '.join(differences)}: name its --data_path and --seed, "
                "or another --output_dir, "
                "or go on nevertheless with --allow_changed_run"
            )
        for difference in differences:
            log.warning(f"warning: the checkpoint is of a run on {difference}; --allow_changed_run goes on")
    for name in sorted(flags.keys() & theirs.keys() - WITHOUT_EFFECT):
        if theirs[name] != flags[name]:
            log.info(f"changed    --{name}: {theirs[name]} -> {flags[name]}")


def check_ranks_agree(flags: Mapping[str, Any]) -> None:
    """UserError on all ranks where they were started with different flags."""
    own = {
        name: bool(value) if name in PATHS else value
        for name, value in flags.items()
        if name not in OF_A_MACHINE
    }
    everyone = distributed.gather_objects(own)
    for rank, theirs in enumerate(everyone):
        for name, value in everyone[0].items():
            if theirs.get(name) != value:
                raise UserError(
                    f"the processes were started with different flags: --{name} {value} on rank 0, "
                    f"{theirs.get(name)} on rank "
                    f"{rank}: give all the same"
                )


def check_ranks_have_the_same_images(data: Mapping[str, Any]) -> None:
    """UserError on all ranks where they found different images. data: as of check_same_run."""
    everyone = distributed.gather_objects(dict(data))
    for rank, theirs in enumerate(everyone):
        if theirs != everyone[0]:
            counts = everyone[0]["images"], theirs["images"]
            what = (
                f"{counts[0]} on rank 0, {counts[1]} on rank {rank}"
                if counts[0] != counts[1]
                else f"other names on rank {rank}"
            )
            raise UserError(
                f"the processes found different images: {what}: --data_path must hold the "
                "same on all machines"
            )


def convert_published(content: dict[str, Any], steps_per_epoch: int, world_size: int) -> dict[str, Any]:
    """A training checkpoint of the published code (its optimizer, and the last epoch it
    finished), as one of ours.
    """
    epoch = content["epoch"] + 1
    return content | {
        "scaler": content.get("scaler"),
        "next": {"epoch": epoch, "samples": 0, "step": epoch * steps_per_epoch},
        "best": -float("inf"),
        "bad_in_a_row": 0,
        "means": [],
        "stage": None,
        "world_size": world_size,
    }


def is_published(content: Mapping[str, Any]) -> bool:
    epoch = content.get("epoch")
    return "next" not in content and "optimizer" in content and isinstance(epoch, int) and epoch >= 0
