"""The demo: runs the entry scripts as a user would, then shows what came out
(scripts/demo.sh calls this).

Stages: photos -> VQ-KD tokenizer -> BEiT v2 pretraining -> fine-tuning, pretrained and
from scratch, with all labels and with 10 % of them. Writes demo_output/: the data, each
stage's folder, pictures/ and summary.json; what an earlier run wrote is kept beside it.
"""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

import torch  # noqa: E402
from torchvision.utils import save_image  # noqa: E402

import stages  # noqa: E402
from advice.command import Command, Machine  # noqa: E402
from advice.inspection import inspect_folder  # noqa: E402
from advice.plan import make_plan  # noqa: E402
from data_pipeline.image_formats import load_image  # noqa: E402
from demo_folders import make_empty  # noqa: E402
from demo_photos import Photo, link, own_images, plan_solar_cells, shrink, solar_cells  # noqa: E402
from errors import UserError, report_user_errors  # noqa: E402
from runtime.terminal import say_if_slow, set_up_logging  # noqa: E402
from stages import (  # noqa: E402
    Stages,
    expect,
    judge_accuracy,
    judge_pretraining,
    judge_tokenizer,
    report,
    run_entry,
)
from visualization import drawing  # noqa: E402

OUT = ROOT / "demo_output"
BATCH_FEW, STEPS_FEW = 32, 120  # of fine-tuning with a tenth of the labels
# from scratch, all blocks learn at one rate, and this one suits: with all labels, and with a tenth
SCRATCH_LR = ("5e-4", "2e-3")


def run(stage: str, command: Command, **changes: object) -> float:
    """The command with other values for some flags, as Command.words; its seconds."""
    more = {"output_dir": OUT / stage, "num_workers": 2, "device": "cpu", **changes}
    return run_entry(stage, command.script, "", *command.words(**more))


def log_of(stage: str) -> list[dict[str, Any]]:
    return stages.log_of(OUT / stage)


@say_if_slow("           making copies of them, shrunk to what the network sees")
def prepare(photos: list[Photo], shrinks: bool = True) -> dict[str, dict[str, int]]:
    """Shrunken copies, or links, in demo_output/data/{train,val}/class; how many there
    are of each.
    """
    counts: dict[str, dict[str, int]] = {"train": {}, "val": {}}
    for number, (source, label, validate) in enumerate(photos):
        split = "val" if validate else "train"
        target = OUT / "data" / split / label / f"{number:06d}{'.jpg' if shrinks else source.suffix}"
        if shrink(source, target) if shrinks else link(source, target):
            counts[split][label] = counts[split].get(label, 0) + 1
    if sum(counts["train"].values()) < 2 or not counts["val"]:
        raise UserError("too few images: the demo needs at least 10 that can be read")
    return counts


def plan_demo(own: bool) -> list[Command]:
    """What advise.py advises for these images on a CPU."""
    if not own:
        return plan_solar_cells(OUT)
    return make_plan(inspect_folder(str(OUT / "data")), Machine.here("cpu"), str(OUT))


# ── Stages ──

FINETUNING = {  # name: what is fine-tuned, whether it is pretrained, with a tenth of the labels
    "acc1": ("fine-tuning the pretrained network with all labels", True, False),
    "acc1_from_scratch": ("the same network from random weights, to compare", False, False),
    "acc1_10pct": ("fine-tuning the pretrained network with 10% of the labels", True, True),
    "acc1_10pct_from_scratch": ("the same network from random weights, to compare", False, True),
}


def list_stages(plan: list[Command], labeled: bool) -> Stages:
    vqkd, pretrain, finetuning = plan
    codes = vqkd.value("codebook_n_emd")

    def seen(command: Command) -> int:
        return command.steps * int(command.value("batch_size"))

    expected = {
        "vqkd": (f"tokenizer: every patch of an image gets one of {codes} codes", expect("vqkd", seen(vqkd))),
        "pretrain": (
            "pretraining, without labels: which codes do hidden patches have?",
            expect("pretrain", seen(pretrain)),
        ),
    }
    for name, (title, _, few) in FINETUNING.items() if labeled else ():
        images = STEPS_FEW * BATCH_FEW if few else seen(finetuning)
        expected[f"finetune_{name}"] = (title, expect("finetune", images))
    return Stages(expected)


def finetune(name: str, command: Command, images: int, pretrained: bool, few: bool) -> float:
    """`few`: with a tenth of the labels. From scratch, each case has the learning rate
    that suits it.
    """
    changes: dict[str, object] = {"no_save_ckpt": True, "image_freq": 0}
    changes["eval_freq"] = command.value("epochs")
    if few:
        epochs = max(1, round(STEPS_FEW / max(1, images // 10 // BATCH_FEW)))
        changes |= {"batch_size": BATCH_FEW, "epochs": epochs, "eval_freq": epochs, "label_fraction": 0.1}
        changes |= {"warmup_steps": round(0.15 * STEPS_FEW)}
    if not pretrained:
        changes |= {"finetune": None, "layer_decay": 1.0, "lr": SCRATCH_LR[few]}
    return run(name, command, **changes)


# ── What came out ──


def summarize(
    counts: dict[str, dict[str, int]], labeled: bool, seconds: dict[str, float], codes: int
) -> dict[str, Any]:
    vqkd, pretraining = log_of("vqkd"), log_of("pretrain")
    finetuning: dict[str, float | None] = dict.fromkeys(
        ("acc1", "acc1_from_scratch", "majority_class", "acc1_10pct", "acc1_10pct_from_scratch")
    )
    if labeled:
        for key in ("acc1", "acc1_from_scratch", "acc1_10pct", "acc1_10pct_from_scratch"):
            finetuning[key] = round(log_of(f"finetune_{key}")[-1]["test_acc1"], 2)
        # not rounded twice: 55.153 is shown as 55.2
        finetuning["majority_class"] = 100 * max(counts["val"].values()) / sum(counts["val"].values())
    return {
        "data": {split: sum(classes.values()) for split, classes in counts.items()},
        "vqkd": {
            "loss_first": vqkd[0]["train_loss"],
            "loss_last": vqkd[-1]["train_loss"],
            "codebook_size": codes,
            "codes_used": vqkd[-1]["train_codes_used"],
            "perplexity": round(vqkd[-1]["train_perplexity"], 1),
        },
        "pretrain": {
            "mlm_acc_first": 100 * pretraining[0]["train_mlm_acc_1"],
            "mlm_acc_last": 100 * pretraining[-1]["train_mlm_acc_1"],
            "majority_code_share": 100 * pretraining[-1]["train_majority_code_share"],
        },
        "finetune": finetuning,
        "pictures": draw(labeled, codes),
        "seconds": {name: round(value, 1) for name, value in seconds.items()}
        | {"total": round(sum(seconds.values()), 1)},
    }


def draw(labeled: bool, codes: int) -> list[str]:
    """The pictures of the demo, in demo_output/pictures."""
    folder = OUT / "pictures"
    folder.mkdir(exist_ok=True)
    for name, pattern in {
        "tokens": "vqkd/pictures/tokens-*",
        "codebook_usage": "vqkd/pictures/codebook_usage-*",
    }.items():
        shutil.copy(sorted(OUT.glob(pattern))[-1], folder / f"{name}.png")
    shown = sorted((OUT / "pretrain/pictures").glob("masked_tokens-*"))
    for name, source in (("masks_and_tokens_before", shown[0]), ("masks_and_tokens_after", shown[-1])):
        shutil.copy(source, folder / f"{name}.png")
    photos = [str(path) for path in sorted((OUT / "data/val").rglob("*.*"))]
    photos = photos[:: max(1, len(photos) // 4)][:4]
    command = [
        sys.executable,
        str(ROOT / "visualize_attention.py"),
        "--checkpoint",
        str(OUT / "pretrain/checkpoint.pth"),
        "--device",
        "cpu",
    ]
    subprocess.run(
        [*command, "--image", *photos, "--output", str(folder / "attention.png")], check=True, cwd=ROOT
    )
    draw_curves(folder / "curves.png", labeled, codes)
    tiles = [folder / f"{name}.png" for name in ("masks_and_tokens_before", "masks_and_tokens_after")]
    rows = [drawing.side_by_side([to_tensor(path) for path in tiles])]
    save_image(rows[0], folder / "overview.png")
    return [str(Path(OUT.name) / "pictures" / path.name) for path in sorted(folder.glob("*.png"))]


def to_tensor(path: Path) -> torch.Tensor:
    import torchvision.transforms.functional as TF

    return TF.to_tensor(load_image(str(path)))


def draw_curves(path: Path, labeled: bool, codes: int) -> None:
    vqkd, pretraining = log_of("vqkd"), log_of("pretrain")
    panels: dict[str, dict[str, Any]] = {
        "VQ-KD loss": {
            "training": [e["train_loss"] for e in vqkd],
            "held out": [e.get("test_loss", math.nan) for e in vqkd],
        },
        # none while the warm-up bypasses the quantizer
        f"of {codes} codes, after the warm-up": {
            "used": [e["train_codes_used"] or math.nan for e in vqkd],
            "perplexity": [e.get("train_perplexity") or math.nan for e in vqkd],
        },
        "masked-token accuracy, %": {
            "main branch": [100 * e["train_mlm_acc_1"] for e in pretraining],
            "CLS branch": [100 * e["train_mlm_acc_2"] for e in pretraining],
            "most frequent code": [100 * e["train_majority_code_share"] for e in pretraining],
        },
    }
    if labeled:
        names = {"acc1": "pretrained", "acc1_from_scratch": "from scratch"}
        panels["fine-tuning loss, all labels"] = {
            label: [e["train_loss"] for e in log_of(f"finetune_{name}")] for name, label in names.items()
        }
    drawing.plot_curves(panels, path)


def show(summary: dict[str, Any]) -> None:
    f, p, v = summary["finetune"], summary["pretrain"], summary["vqkd"]
    rows = [
        ("VQ-KD loss, first and last epoch", f"{v['loss_first']:.3f}", f"{v['loss_last']:.3f}"),
        ("codes used, of all", f"{v['codes_used']}", f"{v['codebook_size']}"),
        ("perplexity of the codes", "", f"{v['perplexity']:.1f}"),
        (
            "masked-token accuracy %, first and last epoch",
            f"{p['mlm_acc_first']:.1f}",
            f"{p['mlm_acc_last']:.1f}",
        ),
        ("share of the most frequent code %", "", f"{p['majority_code_share']:.1f}"),
    ]
    if f["acc1"] is not None:
        rows += [
            ("", "from scratch", "pretrained"),
            ("validation accuracy %, all labels", f"{f['acc1_from_scratch']:.1f}", f"{f['acc1']:.1f}"),
            (
                "validation accuracy %, 10% of the labels",
                f"{f['acc1_10pct_from_scratch']:.1f}",
                f"{f['acc1_10pct']:.1f}",
            ),
            ("share of the most frequent class %", "", f"{f['majority_class']:.1f}"),
        ]
    print("\n" + "\n".join(f"{name:<48}{first:>14}{second:>14}" for name, first, second in rows))
    data = summary["data"]
    print(f"\n{data['train']} training and {data['val']} validation photos; one run, one seed. ", end="")
    print(f"Stages took {summary['seconds']['total'] / 60:.1f} minutes.")
    print("pictures:  " + "\n           ".join(summary["pictures"]))


@report_user_errors
def main(argv: list[str]) -> None:
    make_empty(OUT)
    seconds: dict[str, float] = {}
    started = time.monotonic()
    set_up_logging(0)
    photos = own_images(argv[0]) if argv else solar_cells()
    counts = prepare(photos, shrinks=not argv or inspect_folder(argv[0]).is_rgb8)
    vqkd, pretrain, finetuning = plan = plan_demo(own=bool(argv))
    seconds["data"] = time.monotonic() - started
    images, labeled = sum(counts["train"].values()), len(counts["train"]) >= 2
    codes, largest = int(vqkd.value("codebook_n_emd")), max(counts["val"].values())
    validation = sum(counts["val"].values())
    print(f"           {images:,} of them train, {validation:,} validate; from here on in {OUT.name}/data")
    stages = list_stages(plan, labeled)
    stages.run("vqkd", lambda: run("vqkd", vqkd, eval_freq=5))
    report(judge_tokenizer(log_of("vqkd"), codes))
    stages.run("pretrain", lambda: run("pretrain", pretrain, eval_data_path=None))
    report(judge_pretraining(log_of("pretrain")))
    for name, (_, pretrained, few) in FINETUNING.items() if labeled else ():
        folder = f"finetune_{name}"
        stages.run(folder, partial(finetune, folder, finetuning, images, pretrained, few))
        accuracy = log_of(folder)[-1]["test_acc1"]
        verdict = judge_accuracy(accuracy, 100 * largest / validation, validation)
        report(verdict if pretrained else f"without pretraining it {verdict}")
    print("\n\ndrawing the pictures", flush=True)
    summary = summarize(counts, labeled, seconds | stages.seconds, codes)
    (OUT / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    show(summary)


if __name__ == "__main__":
    main(sys.argv[1:])
