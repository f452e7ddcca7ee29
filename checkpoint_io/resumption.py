"""The checkpoint that a run goes on from: which one it is, and whether it is of this
run. Also whether all processes are of one run: their flags and images are compared,
differences named.
"""

from __future__ import annotations

import contextlib
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import arguments
from checkpoint_io import downloads
from checkpoint_io.checkpoints import LATEST, link_checkpoint, read_checkpoint
from errors import UserError
from runtime import distributed
from runtime.terminal import log

# Flags that say where and how often, not what is trained; data and seed are compared by
# themselves.
WITHOUT_EFFECT = {
    *"""
    output_dir log_dir track device resume auto_resume start_epoch save_ckpt save_ckpt_freq
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
    finetune init_from cooldown_from tokenizer_weight teacher_weight
    """.split()
}
# Flags that decide which tensors a run has, and how its optimizer groups them.
OF_THE_SHAPE = {
    *"""
    model input_size in_chans nb_classes num_heads abs_pos_emb rel_pos_bias qkv_bias use_mean_pooling
    layer_scale_init_value early_layers head_layers shared_lm_head target codebook_size codebook_dim
    codebook_n_emd codebook_emd_dim decoder_depth teacher_model_type teacher_weight train_pixel_decoder
    pixel_decoder_dim pixel_decoder_depth protocol features finetune init_from freeze_epochs layer_decay
    disable_weight_decay_on_rel_pos_bias aux_weight class_names reduce_zero_label
    """.split()
}
OF_A_MACHINE = {"device", "num_workers", "pin_mem", "dist_url", *arguments.OBSOLETE}


def find_checkpoint(resume: str, auto_resume: bool, output_dir: str) -> Path | None:
    """The checkpoint that a run goes on from: `resume`, else with `auto_resume` the
    newest intact one of `output_dir`.

    Rank 0 chooses for all.
    """
    if resume:
        return downloads.fetch(resume)
    if not auto_resume or not output_dir:
        return None
    chosen = find_newest_intact(Path(output_dir)) if distributed.is_main() else None
    return distributed.gather_objects(chosen)[0]


def find_newest_intact(folder: Path) -> Path | None:
    """checkpoint.pth, or where it is damaged, the intact one that is furthest in
    training, with a warning.
    """
    latest = folder / LATEST
    if latest.exists() and is_intact(latest):
        return latest
    others = {
        path: read_progress(path) for path in sorted(folder.glob("checkpoint-*.pth")) if is_intact(path)
    }
    damaged = [
        path for path in [latest, *folder.glob("checkpoint-*.pth")] if path.exists() and path not in others
    ]
    if others:
        newest = max(others, key=others.__getitem__)
        if damaged:
            log.warning(f"warning: {damaged[0]} is damaged (truncated or altered): going on from {newest}")
        return newest
    if damaged:
        raise UserError(
            f"{damaged[0]} is damaged and no other checkpoint in {folder} is whole: remove it to start "
            "again, or name one with `resume`"
        )
    return None


def is_intact(path: Path) -> bool:
    """Whether every tensor is as it was written: a checkpoint is a zip file that holds
    a checksum of each.
    """
    if path.exists() and not path.is_file():  # a pipe would be waited for
        raise UserError(f"{path} is not a regular file: remove it")
    try:
        with zipfile.ZipFile(path) as file:
            return file.testzip() is None
    except PermissionError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}; change its permissions") from None
    except (OSError, zipfile.BadZipFile, zlib.error, EOFError, RuntimeError):  # RuntimeError: encrypted
        return False


def read_progress(path: Path) -> tuple[int, int]:
    """(epoch, step) that a checkpoint goes on with. Times of files do not tell, since
    files can be copied.
    """
    content = read_checkpoint(path)
    after, done = content.get("next"), content.get("epoch")
    if after is None and isinstance(done, int):  # the published code's: the last epoch that it finished
        return done + 1, -1
    epoch, step = (after.get(key) if isinstance(after, dict) else None for key in ("epoch", "step"))
    return (epoch, step) if isinstance(epoch, int) and isinstance(step, int) else (-1, -1)


def keep_published(path: Path, folder: Path) -> None:
    """Give a checkpoint in the run's folder that this code did not write a second name,
    before the run overwrites the first.
    """
    if path.resolve().parent != folder.resolve() or path.stem.startswith("checkpoint-published"):
        return
    names = (f"checkpoint-published{number}.pth" for number in ("", *(f"-{n}" for n in range(2, 1000))))
    kept = next(folder / name for name in names if not (folder / name).exists())
    link_checkpoint(path, kept)
    log.info(f"kept       {path} as {kept}: this run writes its own under the old name")


def check_same_run(
    content: Mapping[str, Any], flags: Mapping[str, Any], data: Mapping[str, Any], path: Any
) -> None:
    """UserError where `content`, a checkpoint, is of other images or another seed and
    `allow_changed_run` is not set; every other flag that changes the result is named,
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
            differences.append(f"`seed` {theirs['seed']}, not {flags['seed']}")
        if differences and not flags["allow_changed_run"]:
            raise UserError(
                f"{path} is of a run on {' and '.join(differences)}: name its `data_path` and `seed`, or "
                "another `output_dir`, or go on nevertheless with `allow_changed_run`"
            )
        for difference in differences:
            log.warning(f"warning: the checkpoint is of a run on {difference}; `allow_changed_run` goes on")
    for name in sorted(flags.keys() & theirs.keys() - WITHOUT_EFFECT):
        if theirs[name] != flags[name]:
            before, now = ("none" if value in ("", None) else value for value in (theirs[name], flags[name]))
            log.info(f"changed    `{name}`: {before} -> {now}")


@contextlib.contextmanager
def naming_changed_flags(content: Mapping[str, Any], flags: Mapping[str, Any], path: Any) -> Iterator[None]:
    """Where the tensors of `content`, a checkpoint, do not fit this run, the UserError
    names the flags that made them so, if any differ.
    """
    try:
        yield
    except UserError:
        theirs = content.get("args", {})
        differ = [
            (f"no `{name}`" if theirs[name] in ("", None) else f"`{name}` {theirs[name]}")
            + f" (now {'none' if flags[name] in ('', None) else flags[name]})"
            for name in sorted(flags.keys() & theirs.keys() & OF_THE_SHAPE)
            if theirs[name] != flags[name]
        ]
        if not differ:
            raise
        raise UserError(
            f"{path} was trained with {', '.join(differ)}, so its weights or its optimizer do not fit this "
            "run: give the flags as they were, or start a new run: another `output_dir`, without `resume`"
        ) from None


def check_can_cool_down(content: Mapping[str, Any], path: Any) -> None:
    """UserError unless `content` is a checkpoint of a run with a constant learning
    rate, which has not begun to fall.
    """
    if "optimizer" not in content or "next" not in content:
        raise UserError(
            f"`cooldown_from` {path} holds only weights: name a checkpoint of a run of `schedule` wsd"
        )
    flags, after = content.get("args", {}), content["next"]
    if flags.get("schedule") != "wsd":
        raise UserError(
            f"`cooldown_from` {path} is of a run whose learning rate was falling: a cool-down goes on "
            "from one of `schedule` wsd"
        )
    planned = flags.get("cooldown_epochs", 0)
    begun = planned and (after["epoch"], after["samples"]) > (flags["epochs"] - planned, 0)
    if begun or content.get("cooldown_start") is not None:
        raise UserError(f"`cooldown_from` {path} is cooling down already: name a checkpoint from before that")


def check_start_epoch(start_epoch: int, epochs: int | None) -> None:
    """UserError where no epoch is left; `epochs` None: the run is counted in steps."""
    if epochs is not None and start_epoch >= epochs:
        raise UserError(
            f"`start_epoch` {start_epoch} leaves nothing to do: give 0 up to {epochs - 1}, the last epoch, "
            "or raise `epochs`"
        )


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
                    f"the processes were started with different flags: `{name}` {value} on rank 0, "
                    f"{theirs.get(name)} on rank {rank}: give all the same"
                )


def check_ranks_have_the_same_images(data: Mapping[str, Any]) -> None:
    """UserError on all ranks where they found different images. `data`: as in
    check_same_run.
    """
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
                f"the processes found different images: {what}: `data_path` must hold the same on all "
                "machines"
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
