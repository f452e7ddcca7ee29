"""Codes and steps of `--crop_cycle` on the photos of the demo (docs/lab/crop_cycle.md);
its accuracy is a question of scripts/evidence.sh.

    python scripts/measure_crop_cycle.py out/cycle --only flips [--amp_dtype bf16]
    python scripts/measure_crop_cycle.py out/cycle --only speed [--model base]

flips: codes of the same views in batches of other neighbors that differ, in a million
patches. speed: a step without the flag, one that stores codes and one that reads them, in
turns: a quiet machine's wall and CPU time.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]

import torch  # noqa: E402

import arguments  # noqa: E402
import run_beitv2_pretraining  # noqa: E402
from advice.command import Command  # noqa: E402
from data_pipeline.files import collate  # noqa: E402
from data_pipeline.samplers import ResumableSampler  # noqa: E402
from engine import Trainer  # noqa: E402
from engine_for_crop_cycle import CachedTokens  # noqa: E402
from engine_for_pretraining import Tokens  # noqa: E402
from errors import report_user_errors  # noqa: E402
from photo_runs import prepare, run  # noqa: E402
from runtime.device import to_device  # noqa: E402

BASE: dict[str, Any] = {  # of --only speed --model base: the published sizes, random weights
    **{"model": "beit_base_patch16_224_8k_vocab_cls_pt", "input_size": 224, "second_input_size": 224},
    **{"num_mask_patches": 75, "min_mask_patches_per_block": 16, "early_layers": 9, "head_layers": 2},
}


def get_parser() -> argparse.ArgumentParser:
    parser = arguments.new_parser("What --crop_cycle costs", "out/cycle --only speed")
    add = parser.add_argument
    add("folder", type=arguments.expand_home, help="where photos and runs go")
    add("--only", default="flips", choices=("flips", "speed"), help="what to measure")
    add("--tokenizer_epochs", type=arguments.positive, default=9, help="of the tokenizer")
    add("--photos", type=arguments.positive, default=10**6, help="only the first N of the demo's 2,624")
    add("--num_workers", type=arguments.not_negative, default=1, help="data processes")
    add("--amp_dtype", default="bf16", choices=("bf16", "fp32"), help="flips, speed: precision")
    add("--model", default="demo", choices=("demo", "base"), help="speed: size of model and tokenizer")
    add("--batch_size", type=arguments.positive, default=64, help="flips, speed: images of a step")
    add("--rounds", type=arguments.positive, default=10, help="speed: steps of each kind")
    return parser


# ── Codes and steps ──


def build(folder: Path, pretrain: Command, args: argparse.Namespace, **changes: Any) -> Trainer:
    """A pretraining with one crop of each image, in a folder of its own."""
    out = folder / f"{args.only}-{args.model}-{args.amp_dtype}-{time.time_ns()}"
    more = {
        "output_dir": out,
        "device": "cpu",
        "num_workers": 0,
        "crop_cycle": 1,
        "epochs": 2,
        "warmup_steps": 1,
    }
    more |= {"amp_dtype": args.amp_dtype, "batch_size": args.batch_size, "eval_data_path": None, **changes}
    return run_beitv2_pretraining.build(run_beitv2_pretraining.parse_flags(pretrain.words(**more)))


@torch.no_grad()
def measure_flips(folder: Path, commands: list[Command], args: argparse.Namespace) -> None:
    """Each image's one crop, encoded in the batches of several epochs, and one by one."""
    vqkd, pretrain, _ = commands
    run(vqkd, folder / "vqkd", epochs=args.tokenizer_epochs, num_workers=args.num_workers)
    trainer = build(folder, pretrain, args)
    target = trainer.stage.target  # type: ignore[attr-defined]
    first = encode_all(target, epoch_batches(trainer, 0, args.batch_size))
    results = {}
    for name, epoch, batch_size in (
        ("the same batches again", 0, args.batch_size),
        ("batches of another order", 1, args.batch_size),
        ("half as large", 1, max(1, args.batch_size // 2)),
        ("one by one", 0, 1),
    ):
        again = encode_all(target, epoch_batches(trainer, epoch, batch_size))
        flips = sum(int((first[index] != codes).sum()) for index, codes in again.items())
        patches = sum(codes.numel() for codes in again.values())
        results[name] = {"patches": patches, "flips": flips, "in_a_million": 1e6 * flips / patches}
        print(f"{name:<26}{patches:>10,} patches {flips:>6} other codes, {1e6 * flips / patches:8.1f} ppm")
    (folder / f"flips-{args.amp_dtype}.json").write_text(json.dumps(results, indent=1) + "\n")


def epoch_batches(trainer: Trainer, epoch: int, batch_size: int) -> Iterator[list[int]]:
    """The images of an epoch's batches, the rest included."""
    sampler = ResumableSampler(trainer.data.sampler.length, batch_size, 1, 0, 1, trainer.run.options.seed)
    sampler.set_position(epoch)
    order = sampler.order().tolist()
    return (order[start : start + batch_size] for start in range(0, len(order), batch_size))


def encode_all(target: CachedTokens, batches: Iterator[list[int]]) -> dict[int, torch.Tensor]:
    """Image -> codes of its crop (N,), as the tokenizer gives them in these batches."""
    found: dict[int, torch.Tensor] = {}
    for images in batches:
        samples = [target.dataset[0, image] for image in images]
        tensors = [{name: s[name] for name in s if name not in ("mask", "shown")} for s in samples]
        batch = target.dataset.views.device_transform(collate(tensors))
        with target.run.precision.autocast():
            codes = Tokens.encode(target, batch).view(len(images), -1)
        found |= dict(zip(images, codes, strict=True))
    return found


def measure_speed(folder: Path, commands: list[Command], args: argparse.Namespace) -> None:
    vqkd, pretrain, _ = commands
    if args.model == "base":
        weights = folder / "base.pth"
        codes: dict[str, Any] = {"tokenizer_model": "vqkd_encoder_base_decoder_3x768x12_clip"}
        make = run_beitv2_pretraining.modeling_vqkd.create_model
        torch.save({"model": make(codes["tokenizer_model"], as_tokenizer=True).state_dict()}, weights)
        codes |= {"tokenizer_weight": weights, "codebook_size": 8192, "codebook_dim": 32, **BASE}
    else:
        run(vqkd, folder / "vqkd", epochs=args.tokenizer_epochs, num_workers=args.num_workers)
        codes = {}
    trainer = build(folder, pretrain, args, **codes)
    target = trainer.stage.target  # type: ignore[attr-defined]
    keys = [(0, image) for image in range(args.batch_size)]
    read, batches = {}, {}
    for name in ("computed", "known"):
        read[name] = timed(lambda: collate(target.dataset.__getitems__(keys)), rounds=3)
        batches[name] = collate(target.dataset.__getitems__(keys))
        target.store([batches[name]])
        target.flush()
    assert "rows" in batches["computed"] and "rows" not in batches["known"]
    # as without the flag: codes of the masked patches alone
    without = {name: value for name, value in batches["computed"].items() if name not in ("codes", "rows")}
    batches["off"] = without

    def step(batch: dict[str, Any]) -> None:
        with trainer.run.precision.autocast():
            moved = target.dataset.device_transform(to_device(batch, trainer.run.device))
            loss, _ = trainer.stage.step(trainer.state.runner, moved)
        loss.backward()
        target.pending.clear()

    times: dict[str, list[tuple[float, float]]] = {name: [] for name in batches}
    trainer.state.runner.train()
    for number in range(args.rounds + 1):
        for name, batch in batches.items():
            took = timed(lambda batch=batch: step(batch))  # type: ignore[misc]
            if number:  # the first is a warm-up
                times[name].append(took)
    for kind, place in (("wall", 0), ("CPU", 1)):
        off, computed, known = (
            statistics.median(each[place] for each in times[name]) for name in ("off", "computed", "known")
        )
        print(
            f"step, {kind:<4} off {off:.3f} s, storing codes {computed:.3f}, reading them {known:.3f}: "
            f"{off / known:.2f} times as fast as off"
        )
    print(f"reading    {read['computed'][1]:8.3f} s of CPU time, with known codes {read['known'][1]:8.3f}")
    content = {"steps": times, "reading": read, "batch_size": args.batch_size, "amp_dtype": args.amp_dtype}
    (folder / f"speed-{args.model}.json").write_text(json.dumps(content, indent=1) + "\n")


def timed(do: Callable[[], Any], rounds: int = 1) -> tuple[float, float]:
    """Wall and CPU seconds of one round."""
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(rounds):
        do()
    return (time.perf_counter() - wall) / rounds, (time.process_time() - cpu) / rounds


@report_user_errors
def main(argv: list[str] | None = None) -> None:
    args = arguments.parse(get_parser(), argv)
    folder = Path(args.folder).absolute()
    commands = prepare(folder, args.photos)
    {"flips": measure_flips, "speed": measure_speed}[args.only](folder, commands, args)


if __name__ == "__main__":
    main()
