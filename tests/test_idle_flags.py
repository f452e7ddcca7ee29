"""Every flag of every command is read by what the command then does, or is refused, or
says that it does nothing: one that is only accepted misleads.
"""

import re
from unittest.mock import MagicMock

import pytest
import torch
from refusals import refused
from source_files import ROOT
from tiny_classifier import MODEL, classifier
from tiny_runs import (
    TOKENIZER,
    as_flags,
    checkpoint,
    finetuning_flags,
    labeled_pixels,
    pretraining_flags,
    segmentation_flags,
    student,
    tokenizer,
    vqkd_flags,
)

import advise
import arguments
import benchmark
import compare_runs
import encode_images
import estimate
import export_checkpoint
import extract_features
import run_beitv2_pretraining
import run_class_finetuning
import run_linear_eval
import run_segmentation_finetuning
import run_state
import run_vqkd_training
import schedules
import visualize_attention
import visualize_codebook
import visualize_reconstruction
from flags import finetuning, linear_eval, pretraining, segmentation, vqkd

FIXED = as_flags(device="cpu", num_workers=0)


class NotedDict(dict):
    """Notes which of its values are asked for by name."""

    def __init__(self, content, names):
        super().__init__(content)
        self.names = names

    def __getitem__(self, name):
        self.names.add(name)
        return super().__getitem__(name)

    def get(self, name, default=None):
        self.names.add(name)
        return super().get(name, default)


class Reads:
    """Names of the flags that a command asks for once they are parsed and checked; not
    those that are only logged, kept, or copied into an object whose fields count.
    """

    def __init__(self, monkeypatch):
        self.names, self.on = set(), False
        plainly = object.__getattribute__

        def noted(flags, name):
            if self.on and name == "__dict__":
                return NotedDict(plainly(flags, name), self.names)
            if self.on:
                self.names.add(name)
            return plainly(flags, name)

        for kind in (arguments.Flags, run_state.RunOptions, schedules.ScheduleOptions):
            monkeypatch.setattr(kind, "__getattribute__", noted)
        monkeypatch.setattr(arguments, "options", self.switching(arguments.options, afterwards=None))
        monkeypatch.setattr(arguments, "parse", self.switching(arguments.parse, afterwards=True))
        self.monkeypatch = monkeypatch

    def switching(self, function, afterwards):
        def called(*args, **kwargs):
            before, self.on = self.on, False
            try:
                return function(*args, **kwargs)
            finally:
                self.on = before if afterwards is None else afterwards

        return called

    def run(self, entry, flags):
        """The parsed flags, or None of a script without `parse_flags`."""
        kept = []
        with self.monkeypatch.context() as patched:
            if hasattr(entry, "parse_flags"):
                parse = entry.parse_flags
                patched.setattr(
                    entry,
                    "parse_flags",
                    self.switching(lambda argv: kept.append(parse(argv)) or kept[-1], afterwards=True),
                )
            entry.main([str(word) for word in flags])
        self.on = False
        return kept[0] if kept else None


@pytest.fixture(scope="module")
def files(data, tmp_path_factory):
    """Weights of each kind and images, by name."""
    folder = tmp_path_factory.mktemp("files")
    tokenizer(folder / "vqkd.pth")
    student(folder / "pt.pth")
    classifier(2, folder / "ft.pth")
    torch.save(checkpoint(folder / "ft.pth") | {"stage": {"classes": ["a", "b"]}}, folder / "ft.pth")
    labeled_pixels(folder / "pairs")
    run_segmentation_finetuning.main(segmentation_flags(folder / "pairs", folder / "seg"))
    decoder = as_flags(data_path=data, train_pixel_decoder=True, tokenizer_weight=folder / "vqkd.pth")
    decoder += as_flags(output_dir=folder / "decoder", pixel_decoder_dim=32, epochs=1, batch_size=8)
    run_vqkd_training.main([*decoder, *FIXED, *as_flags(input_size=32, image_freq=0)])
    codes = as_flags(tokenizer_weight=folder / "vqkd.pth", data_path=data, output_dir=folder / "codes")
    encode_images.main([*codes, *FIXED])
    return folder


def knn_folder(out, data):
    (out / "knn").mkdir(exist_ok=True)
    for name in ("train", "val"):
        (out / "knn" / name).symlink_to(data)
    return out / "knn"


# mode -> (command, what says which of its flags are idle, lines of flags that together
# use all others)
def modes(files, data, out):
    weights = {name: files / f"{name}.pth" for name in ("vqkd", "pt", "ft")}
    held_out = as_flags(eval_data_path=data, image_freq=1)
    every = [*held_out, *as_flags(save_ckpt_steps=1)]
    knn = as_flags(knn_freq=1, knn_data_path=knn_folder(out, data))
    labeled = as_flags(data_set="image_folder", data_path=data, eval_data_path=data)
    linear = [*as_flags(finetune=weights["pt"], amp_dtype="fp32", batch_size=4), *labeled, *FIXED]
    shape = as_flags(model=MODEL, layer_scale_init_value=0.1, qkv_bias=True, rel_pos_bias=True)
    shape += as_flags(use_mean_pooling=True)
    segmenter, pairs = files / "seg/checkpoint.pth", files / "pairs"
    return {
        "vqkd": (
            run_vqkd_training,
            vqkd.idle_flags,
            [
                vqkd_flags(data, out / "v", *every),
                vqkd_flags(data, out / "w", *as_flags(init_from=weights["vqkd"], opt="sgd")),
            ],
        ),
        "vqkd --eval": (
            run_vqkd_training,
            vqkd.idle_flags,
            [
                vqkd_flags(
                    *(data, out / "e", *held_out, *as_flags(resume=weights["vqkd"])),
                    "--calculate_codebook_usage",
                )
            ],
        ),
        "pixel decoder": (
            run_vqkd_training,
            vqkd.idle_flags,
            [
                [
                    *as_flags(data_path=data, tokenizer_weight=weights["vqkd"], output_dir=out / "d"),
                    *as_flags(
                        epochs=1, train_pixel_decoder=True, pixel_decoder_dim=32, input_size=32, batch_size=4
                    ),
                    *every,
                    *FIXED,
                ]
            ],
        ),
        "pretraining": (
            run_beitv2_pretraining,
            pretraining.idle_flags,
            [
                pretraining_flags(data, out / "p", weights["vqkd"], *every, *knn),
                pretraining_flags(data, out / "q", weights["vqkd"], "--init_from", weights["pt"]),
            ],
        ),
        "pretraining --target pixels": (
            run_beitv2_pretraining,
            pretraining.idle_flags,
            [pretraining_flags(data, out / "x", weights["vqkd"], *every, *knn, "--target", "pixels")],
        ),
        "fine-tuning": (
            run_class_finetuning,
            finetuning.idle_flags,
            [
                finetuning_flags(data, out / "f", *every, *as_flags(finetune=weights["pt"], model_ema=True)),
                finetuning_flags(data, out / "g", *as_flags(mixup=0.8, cutmix=1.0, epochs=1)),
            ],
        ),
        "fine-tuning --eval": (
            run_class_finetuning,
            finetuning.idle_flags,
            [[*as_flags(eval=True, resume=weights["ft"], output_dir=out / "fe"), *labeled, *shape, *FIXED]],
        ),
        "fine-tuning --predict": (
            run_class_finetuning,
            finetuning.idle_flags,
            [[*as_flags(predict=data, resume=weights["ft"], output_dir=out / "fp"), *shape, *FIXED]],
        ),
        "segmentation": (
            run_segmentation_finetuning,
            segmentation.idle_flags,
            [segmentation_flags(pairs, out / "s", *as_flags(finetune=weights["pt"], image_freq=1))],
        ),
        "segmentation --eval": (
            run_segmentation_finetuning,
            segmentation.idle_flags,
            [[*as_flags(eval=True, data_path=pairs, resume=segmenter, output_dir=out / "se"), *FIXED]],
        ),
        "segmentation --predict": (
            run_segmentation_finetuning,
            segmentation.idle_flags,
            [[*as_flags(predict=data, resume=segmenter, output_dir=out / "sp"), *FIXED]],
        ),
        "linear probe": (
            run_linear_eval,
            linear_eval.idle_flags,
            [[*linear, *as_flags(epochs=1, output_dir=out / "l")]],
        ),
        "published linear probe": (
            run_linear_eval,
            linear_eval.idle_flags,
            [[*linear, *as_flags(epochs=1, protocol="published", output_dir=out / "lp")]],
        ),
        "k-NN": (
            run_linear_eval,
            linear_eval.idle_flags,
            [[*linear, *as_flags(knn=True, output_dir=out / "k")]],
        ),
    }


MODES = (
    *("vqkd", "vqkd --eval", "pixel decoder", "pretraining", "pretraining --target pixels"),
    *("fine-tuning", "fine-tuning --eval", "fine-tuning --predict"),
    *("segmentation", "segmentation --eval", "segmentation --predict"),
    *("linear probe", "published linear probe", "k-NN"),
)


# flags that do nothing here and are refused, each with a value
ONLY_EVALUATED = {"robust_test": "imagenet-a", "tta_flip": True, "worst_classes": 3}
ONLY_PIXEL_DECODER = {"pixel_decoder_depth": 3, "pixel_decoder_dim": 64, "tokenizer_weight": "x"}
ONLY_KNN = {"compare": "x", "knn_k": 3, "knn_standardize": True, "knn_temperature": 1}
REFUSED = {
    "vqkd": ONLY_PIXEL_DECODER,
    "vqkd --eval": {**ONLY_PIXEL_DECODER, "init_from": "x", "train_pixel_decoder": True},
    "pixel decoder": {
        **{"codebook_emd_dim": 8, "codebook_n_emd": 16, "decoder_depth": 2, "ema_decay": 0.5},
        **{"init_from": "x", "layer_decay": 0.5, "model": TOKENIZER, "process_type": "imagenet_norm"},
        **{"quantize_kmeans_init": True, "quantizer_warmup_steps": 3, "revive_dead_codes": True},
        **{"standardize_teacher": "on", "teacher_channels": 0, "teacher_input_size": 64},
        **{"teacher_model_type": "hog", "teacher_weight": "x", "freeze_epochs": 1, "mean_std": "half"},
        **{"imagenet_default_mean_and_std": True, "health_freq": 1},
    },
    "pretraining": {"knn_data_path": "x"},
    "fine-tuning": ONLY_EVALUATED,
    "fine-tuning --eval": {"abs_pos_emb": True},
    "fine-tuning --predict": {"abs_pos_emb": True, "robust_test": "imagenet-a", "worst_classes": 3},
    "linear probe": {**ONLY_KNN, "avgpool_patchtokens": False},
    "published linear probe": {**ONLY_KNN, "avgpool_patchtokens": False},
    "k-NN": {
        **{"avgpool_patchtokens": False, "color_jitter": 0.1, "min_crop_scale": 0.5, "vflip": 0.5},
        "train_interpolation": "bilinear",
    },
}
ELSEWHERE = {
    "allow_changed_run",  # read where a run resumes
    "rec_loss_type",  # takes one value
    *("discrete_vae_type", "discrete_vae_weight_path"),  # become others while they are parsed
    "for_pretraining",  # makes a line one of another command
}


@pytest.mark.parametrize("mode", MODES)
def test_every_flag_acts_or_says_that_it_does_nothing(mode, files, data, tmp_path, monkeypatch):
    entry, idle_flags, lines = modes(files, data, tmp_path)[mode]
    reads = Reads(monkeypatch)
    flags = {action.dest for action in entry.get_parser()._actions} - {"help", "config"}
    flags -= {*arguments.OBSOLETE, *REFUSED.get(mode, ()), *ELSEWHERE}
    for line in lines:
        reads.names.clear()
        args = reads.run(entry, line)
        assert flags - reads.names - set(idle_flags(args)) == set()


@pytest.mark.parametrize("mode", REFUSED)
def test_flags_that_are_refused_are(mode, files, data, tmp_path, capsys):
    entry, _, lines = modes(files, data, tmp_path)[mode]
    for name, value in REFUSED[mode].items():
        line = [str(word) for word in lines[-1]]
        assert (
            name in refused(entry.main, [*line, *as_flags(**{name: value})], capsys) or name == "abs_pos_emb"
        )


def test_a_flag_of_another_stage_says_that_it_does_nothing(data, files, capsys):
    """VQ-KD has a flag of its own for the normalization."""
    flags = vqkd_flags(data, "", "--imagenet_default_mean_and_std", *as_flags(epochs=1))
    run_vqkd_training.build(vqkd.parse_flags(flags))
    said = "--imagenet_default_mean_and_std does nothing here: the tokenizer has --process_type"
    assert said in capsys.readouterr().out


SCRIPTS = {
    "advise": (
        advise,
        lambda f, d, out: [str(d), *as_flags(output=out / "plan.json", output_dir=out, device="cpu")],
    ),
    "benchmark": (
        benchmark,
        lambda f, d, out: [
            *as_flags(device="cpu", model="demo", batch_size=1, rounds=1, warmup=1, amp_dtype="fp32"),
            *as_flags(stage="vqkd", output=out / "speed.json"),
        ],
    ),
    "compare_runs": (
        compare_runs,
        lambda f, d, out: [
            str(f / "decoder"),
            "--by_seed",
            *as_flags(csv=out / "r.csv", html=out / "r.html"),
        ],
    ),
    "estimate": (
        estimate,
        lambda f, d, out: [
            *("run_class_finetuning.py", *finetuning_flags(d, "")),
            *as_flags(gpus=1, gpu="T4-16GB", images=100, price=1, mfu=0.5, output=out / "e.json"),
        ],
    ),
    "encode_images": (
        encode_images,
        lambda f, d, out: as_flags(
            tokenizer_weight=f / "vqkd.pth", data_path=d, output_dir=out, device="cpu"
        ),
    ),
    "extract_features": (
        extract_features,
        lambda f, d, out: [str(f / "pt.pth"), str(d), *as_flags(output=out / "f.npy", device="cpu")],
    ),
    "visualize_attention": (
        visualize_attention,
        lambda f, d, out: as_flags(checkpoint=f / "pt.pth", image=d, output=out / "a.png", device="cpu"),
    ),
    "visualize_codebook": (
        visualize_codebook,
        lambda f, d, out: as_flags(encoded=f / "codes", output=out / "c.html"),
    ),
    "visualize_reconstruction": (
        visualize_reconstruction,
        lambda f, d, out: as_flags(
            checkpoint=f / "decoder/checkpoint.pth", image=d, output=out / "r.png", device="cpu"
        ),
    ),
    "export_checkpoint": (
        export_checkpoint,
        lambda f, d, out: as_flags(checkpoint=f / "ft.pth", to="huggingface", output=out / "hf"),
    ),
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_of_a_script_is_read(script, files, data, tmp_path, monkeypatch):
    entry, line = SCRIPTS[script]
    stages = dict.fromkeys(advise.ENTRIES, MagicMock())  # whose flags are not the script's
    monkeypatch.setattr(advise, "ENTRIES", stages)
    monkeypatch.setattr(advise, "time_steps", lambda trainer: 1.0)
    reads = Reads(monkeypatch)
    reads.run(entry, line(files, data, tmp_path))
    flags = {action.dest for action in entry.get_parser()._actions} - {"help", "config", *ELSEWHERE}
    assert flags - reads.names == set()


def test_a_plan_without_a_trial_says_which_flags_do_nothing(data, capsys):
    advise.main([str(data), *as_flags(device="cpu", num_workers=3, no_probe=True)])
    assert "--num_workers does nothing here: --no_probe tries nothing out" in capsys.readouterr().out


def test_every_command_with_flags_is_here(files, data, tmp_path):
    commands = {path.stem for path in ROOT.glob("*.py") if re.search("^def main", path.read_text(), re.M)}
    of_stages = modes(files, data, tmp_path)
    tested = {entry.__name__ for entry, _, _ in of_stages.values()} | SCRIPTS.keys()
    assert of_stages.keys() == set(MODES)
    assert commands - tested == {"model_zoo"}  # which takes names alone
