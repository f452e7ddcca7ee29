"""The flags of the small runs, and the runs of one set of photos and one seed.

All are `mini` models (64 wide, 6 blocks) of 96-pixel images, 6 x 6 patches, in batches of
32, in fp32 on one thread: one to two minutes of a core each.
"""

from __future__ import annotations

from dataclasses import dataclass

from evidence.photos import ALL, CLASSIFIED
from evidence.runs import Run

TOKENIZER = "vqkd_encoder_mini_decoder_1x64x2_hog"
MODEL = "beit_mini_patch16_96_8k_vocab"
# of pretraining a multiple of 4, about 520 steps; of the tokenizer 190, of fine-tuning 260
EPOCHS = {
    "cells": {"vqkd": 3, "pretrain": 8, "finetune": 4},
    "tiles": {"vqkd": 10, "pretrain": 28, "finetune": 14},
    "assay": {"vqkd": 10, "pretrain": 28},
}
# labels in percent -> epochs of batches of 16, about 200 steps
FEW = {"cells": {10: 16, 5: 32}, "tiles": {10: 64, 5: 192}}
SHARED = "--input_size 96 --num_workers 0 --device cpu --amp_dtype fp32 --track none"
CROPS = "--min_crop_scale 0.35 --image_freq 0"
VQKD = f"""--model {TOKENIZER} --teacher_model_type efficientnet_lite0 --teacher_input_size 96
    --codebook_n_emd 256 --codebook_emd_dim 16 --quantizer_warmup_steps 60 --revive_dead_codes
    --batch_size 32 --lr 2e-3 --opt_betas 0.9 0.99 --clip_grad 3.0 --warmup_steps 40 --health_freq 0"""
PRETRAIN = f"""--model {MODEL}_cls_pt --tokenizer_model {TOKENIZER} --codebook_size 256 --codebook_dim 16
    --second_input_size 96 --num_mask_patches 14 --min_mask_patches_per_block 4 --early_layers 4
    --head_layers 1 --drop_path 0 --batch_size 32 --lr 1.5e-3 --opt_betas 0.9 0.98 --clip_grad 3.0
    --color_jitter 0 --warmup_steps 60"""
FINETUNE = """--model beit_mini_patch16_96 --data_set image_folder --batch_size 32 --lr 4e-3
    --layer_decay 0.8 --drop_path 0 --clip_grad 3.0 --min_crop_scale 0.5 --aa none --color_jitter 0
    --reprob 0 --warmup_steps 30 --image_freq 0 --no_save_ckpt"""
SEGMENT = """--model upernet_beit_mini_patch16 --base_size 420 --scale_range 0.75 1.5 --batch_size 8
    --warmup_steps 20 --clip_grad 3.0 --drop_path 0.1 --max_class_share 0.9 --lr 1e-3 --layer_decay 1.0
    --class_names PHOTOS/classes.txt --palette PHOTOS/palette.txt --data_path PHOTOS/few --image_freq 0"""
LINEAR = "--data_set image_folder --cached_features --batch_size 64 --epochs 30 --lr 4e-3"


@dataclass(frozen=True)
class Pretraining:
    """How a variant differs from the one that is called `base`: the tokenizer's flags
    and its own; None leaves a flag out, '' makes it a switch.
    """

    tokenizer: str | None = "base"  # a variant of TOKENIZERS
    changes: tuple[tuple[str, str | None], ...] = ()
    continued: bool = False  # from the weights of `base` on the other photos


def changes(**values: str | None) -> tuple[tuple[str, str | None], ...]:
    return tuple(values.items())


TOKENIZERS = {
    "base": changes(),
    # an encoder that stays random; its codes are the k-means of what it gives
    "untrained": changes(lr="0", min_lr="0", epochs="2"),
    "teacher-hog": changes(teacher_model_type="hog"),
    "teacher-random": changes(teacher_weight="random"),
    "codes-64": changes(codebook_n_emd="64"),
    "codes-1024": changes(codebook_n_emd="1024"),
    "dim-8": changes(codebook_emd_dim="8"),
    "dim-32": changes(codebook_emd_dim="32"),
    "no-kmeans": changes(quantizer_warmup_steps="0"),
    "no-revival": changes(revive_dead_codes=None),
    "neither": changes(quantizer_warmup_steps="0", revive_dead_codes=None),
}
NO_TOKENIZER = changes(
    target="pixels", tokenizer_model=None, codebook_size=None, codebook_dim=None, second_input_size=None
)
PRETRAININGS = {
    "base": Pretraining(),
    "pixels": Pretraining(None, NO_TOKENIZER),
    "untrained-tokenizer": Pretraining("untrained"),
    "random-masks": Pretraining(changes=changes(mask_type="random", min_mask_patches_per_block=None)),
    "all-patches": Pretraining(changes=changes(predict="all")),
    "no-cls-head": Pretraining(changes=changes(model=MODEL, early_layers=None, head_layers=None)),
    **{name: Pretraining(name) for name in ("teacher-hog", "teacher-random")},
    **{f"codes-{size}": Pretraining(f"codes-{size}", changes(codebook_size=size)) for size in ("64", "1024")},
    **{f"dim-{size}": Pretraining(f"dim-{size}", changes(codebook_dim=size)) for size in ("8", "32")},
    **{name: Pretraining(name) for name in ("no-kmeans", "no-revival", "neither")},
    "continued": Pretraining(continued=True),
    **{f"crops-{count}": Pretraining(changes=changes(crop_cycle=count)) for count in ("1", "4")},
}


def flags_of(text: str, more: tuple[tuple[str, str | None], ...] = ()) -> tuple[str, ...]:
    """`text` with other values for some flags."""
    groups = [group.split() for group in f" {text}".split(" --")[1:]]
    values = {name: tuple(rest) for name, *rest in groups}
    for name, value in more:
        values.pop(name, None)
        if value is not None:
            values[name] = (value,) if value else ()
    return tuple(word for name, rest in values.items() for word in (f"--{name}", *rest))


@dataclass(frozen=True)
class Recipes:
    """The runs of one set of photos and one seed."""

    photos: str
    seed: int

    @property
    def shared(self) -> str:
        vflip = " --vflip 0.5" if ALL[self.photos].vflip else ""
        if self.photos not in CLASSIFIED:  # pieces of all training tiles; none is held out
            return f"{SHARED} --data_path PHOTOS/pieces{vflip}"
        return f"{SHARED} --data_path PHOTOS/train --eval_data_path PHOTOS/val{vflip}"

    def length(self, stage: str, times: int = 1) -> str:
        epochs = times * EPOCHS[self.photos][stage]
        return f"--epochs {epochs}" + (f" --eval_freq {epochs}" if self.photos in CLASSIFIED else "")

    def tokenizer(self, variant: str) -> Run:
        text = f"{VQKD} {CROPS} {self.shared} {self.length('vqkd')}"
        return Run("vqkd", self.photos, variant, self.seed, flags_of(text, TOKENIZERS[variant]))

    def pretraining(self, variant: str) -> Run:
        row, epochs = PRETRAININGS[variant], EPOCHS[self.photos]["pretrain"]
        text = f"{PRETRAIN} {CROPS} {self.shared} {self.length('pretrain')}"
        if self.photos in CLASSIFIED:
            text += f" --knn_freq {epochs} --knn_data_path PHOTOS --health_freq {epochs // 4}"
        inputs = [] if row.tokenizer is None else [("tokenizer_weight", self.tokenizer(row.tokenizer))]
        if row.continued:
            other = next(name for name in CLASSIFIED if name != self.photos)
            inputs.append(("init_from", Recipes(other, self.seed).pretraining("base")))
        return Run("pretrain", self.photos, variant, self.seed, flags_of(text, row.changes), tuple(inputs))

    def finetuning(self, variant: str | None, percent: int = 100, times: int = 1, decay: bool = True) -> Run:
        """Of a pretraining, or from scratch, with some of the labels; `times` as long.
        decay: of the learning rate of the layers below; never from scratch.
        """
        own: dict[str, str | None] = {} if variant and decay else {"layer_decay": "1.0"}
        epochs = times * EPOCHS[self.photos]["finetune"]
        if percent < 100:
            epochs = times * FEW[self.photos][percent]
            own |= {"label_fraction": f"{percent / 100}", "batch_size": "16"}
        text = f"{FINETUNE} {self.shared} --epochs {epochs} --eval_freq {epochs}"
        name = f"{variant or 'scratch'}-{percent}" + (f"-x{times}" if times > 1 else "")
        name += "" if decay else "-no-decay"
        inputs = (("finetune", self.pretraining(variant)),) if variant else ()
        return Run("finetune", self.photos, name, self.seed, flags_of(text, changes(**own)), inputs)

    def linear(self, variant: str, features: str) -> Run:
        text = f"{LINEAR} {self.shared} --features {features}"
        inputs = (("finetune", self.pretraining(variant)),)
        return Run(
            "linear",
            self.photos,
            f"{variant}-{features}",
            self.seed,
            flags_of(text, changes(vflip=None)),
            inputs,
        )

    def segmentation(self, variant: str | None, steps: int = 150) -> Run:
        """Of a pretraining, or from scratch, with the masks of a sixth of the tiles."""
        text = f"{SEGMENT} {SHARED} --max_steps {steps} --steps_per_epoch {steps}"
        inputs = (("finetune", self.pretraining(variant)),) if variant else ()
        return Run("segment", self.photos, variant or "scratch", self.seed, flags_of(text), inputs)
