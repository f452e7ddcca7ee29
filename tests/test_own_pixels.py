"""Whatever opens a checkpoint to run it reads and normalizes images as it was trained:
their channels, the range of their numbers, mean and std. Of images of one color each,
every view shows the network the same numbers.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import tiny_runs
import torch
from PIL import Image
from refusals import refused
from source_files import ROOT, library_files, module_name
from tiny_classifier import MODEL
from tiny_runs import TOKENIZER, as_flags

import encode_images
import export_checkpoint
import extract_features
import hubconf
import modeling_finetune
import modeling_segmentation
import modeling_vqkd
import run_class_finetuning
import run_linear_eval
import run_segmentation_finetuning
import run_vqkd_training
import visualize_attention
import visualize_codebook
import visualize_reconstruction
from transforms import normalization_of
from visualization.pixel_decoder import Reconstructor
from vit_backbone import PatchEmbed

FIXED = as_flags(device="cpu", num_workers=0)
RUN = [*FIXED, *as_flags(amp_dtype="fp32", batch_size=2)]


@dataclass(frozen=True)
class World:
    """Images of one color each in two classes, and a checkpoint of each kind of random
    weights that says how images are read.
    """

    folder: Path
    flags: dict
    colors: np.ndarray  # (images, channels) as in the files

    @property
    def images(self):
        return self.folder / "images"

    @property
    def expected(self):
        """(images, channels) normalized, sorted."""
        low, high = self.flags["image_range"] or (0, 65535)
        mean, std = np.split(np.array(self.flags["mean_std"]), 2)
        return np.sort(((self.colors - low) / (high - low) - mean) / std, axis=0)

    def file(self, kind):
        return str(self.folder / f"{kind}.pth")

    def out(self, name):
        return str(self.folder / "out" / name)


def four_channels(path, color):
    np.save(path.with_suffix(".npy"), np.broadcast_to(color.astype("uint16"), (40, 40, 4)))


def gray_16_bits(path, color):
    Image.fromarray(np.full((40, 40), color[0], dtype="uint16")).save(path.with_suffix(".png"))


WORLDS = {
    "four channels": (
        four_channels,
        {
            "in_chans": 4,
            "image_range": [-100.0, 4000.0],
            "mean_std": [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8],
        },
    ),
    "gray, 16 bits": (gray_16_bits, {"in_chans": 1, "image_range": None, "mean_std": [0.3, 0.2]}),
}


@pytest.fixture(scope="module", params=WORLDS)
def world(request, tmp_path_factory):
    write, pixels = WORLDS[request.param]
    folder, channels = tmp_path_factory.mktemp("world"), pixels["in_chans"]
    colors = np.random.RandomState(0).randint(300, 4000, (4, channels))
    for number, color in enumerate(colors):
        place = folder / "images" / "ab"[number % 2]
        place.mkdir(parents=True, exist_ok=True)
        write(place / str(number), color)
        for split in ("training", "validation"):
            for kind in ("images", "annotations"):
                (folder / "pairs" / kind / split).mkdir(parents=True, exist_ok=True)
            write(folder / "pairs" / "images" / split / str(number), color)
            mask = Image.fromarray(np.arange(1600, dtype=np.uint8).reshape(40, 40) % 2)
            mask.save(folder / "pairs" / "annotations" / split / f"{number}.png")
    flags = {"input_size": 32, "imagenet_default_mean_and_std": False, **pixels}
    save_weights(folder, channels, flags)
    return World(folder, flags, colors)


def save_weights(folder, channels, flags):
    sizes = {"img_size": 32, "in_chans": channels}
    statistics = {"mean_std": normalization_of(flags), "decoder_out_dim": 36 * channels}
    codes = modeling_vqkd.create_model(
        TOKENIZER, **sizes, **statistics, n_code=16, code_dim=8, as_tokenizer=True
    )
    networks = {
        "classifier": modeling_finetune.create_model(MODEL, **sizes, num_classes=2, init_values=0.1),
        "segmenter": modeling_segmentation.create_model("upernet_beit_demo_patch16", 2, **sizes),
        "tokenizer": codes,
    }
    more = {"classifier": {"model": MODEL, "crop_pct": None}, "segmenter": {"base_size": 32}}
    for name, network in networks.items():
        content = {"model": network.state_dict(), "args": flags | more.get(name, {"model": TOKENIZER})}
        torch.save(content, folder / f"{name}.pth")
    torch.save({"model": Reconstructor(codes, 1, 32).state_dict(), "args": flags}, folder / "decoder.pth")
    tiny_runs.student(folder / "student.pth", **flags)


def hub(kind, entry):
    def run(world):
        network = getattr(hubconf, entry)(world.file(kind))
        for path in sorted(world.images.glob("*/*")):
            image = network.view(network.view.load(str(path)))["image"][None]
            (network.get_codebook_indices if entry == "tokenizer" else network)(image)

    return run


def exported(to, output):
    """By way of another format, and back."""

    def run(world):
        there = world.out(output)
        export_checkpoint.main(as_flags(checkpoint=world.file("classifier"), to=to, output=there))
        extract_features.main([there, str(world.images), *as_flags(output=world.out("f.npy")), *FIXED])

    return run


def labeled(world):
    return as_flags(data_set="image_folder", data_path=world.images, eval_data_path=world.images)


def pairs(world):
    return world.folder / "pairs"


def linear(*more):
    def run(world):
        start = as_flags(finetune=world.file("student"))
        every = [*labeled(world), *RUN, *more]
        compared = ["--compare", world.file("classifier")] if "--knn" in more else []
        run_linear_eval.main([*start, *every, *compared])

    return run


def tuned(entry, kind, **more):
    def run(world):
        entry.main([*as_flags(resume=world.file(kind)), *RUN, *as_flags(**more_of(world, more))])

    return run


def more_of(world, more):
    return {name: value(world) if callable(value) else value for name, value in more.items()}


COMMANDS = {
    "extract_features": lambda w: extract_features.main(
        [w.file("student"), str(w.images), *as_flags(output=w.out("s.npy")), *FIXED]
    ),
    "hubconf backbone": hub("student", "backbone"),
    "hubconf classifier": hub("classifier", "classifier"),
    "hubconf tokenizer": hub("tokenizer", "tokenizer"),
    "hubconf segmenter": hub("segmenter", "segmenter"),
    "visualize_attention": lambda w: visualize_attention.main(
        as_flags(checkpoint=w.file("student"), image=w.images, output=w.out("a.png"), device="cpu")
    ),
    "visualize_reconstruction": lambda w: visualize_reconstruction.main(
        as_flags(checkpoint=w.file("decoder"), image=w.images, output=w.out("r.png"), device="cpu")
    ),
    "encode_images": lambda w: encode_images.main(
        [*as_flags(tokenizer_weight=w.file("tokenizer"), data_path=w.images, output_dir=w.out("c")), *FIXED]
    ),
    "run_linear_eval": linear("--epochs", "1"),
    "run_linear_eval --knn --compare": linear("--knn", "--knn_k", "1"),
    "run_class_finetuning --eval": tuned(
        run_class_finetuning,
        "classifier",
        eval=True,
        data_set="image_folder",
        eval_data_path=lambda w: w.images,
    ),
    "run_class_finetuning --predict": tuned(
        run_class_finetuning, "classifier", predict=lambda w: w.images, output_dir=lambda w: w.out("p")
    ),
    "run_segmentation_finetuning --eval": tuned(
        run_segmentation_finetuning, "segmenter", eval=True, data_path=pairs
    ),
    "run_segmentation_finetuning --predict": tuned(
        run_segmentation_finetuning, "segmenter", predict=lambda w: w.images, output_dir=lambda w: w.out("l")
    ),
    "run_vqkd_training --eval": tuned(
        run_vqkd_training,
        "tokenizer",
        **{"eval": True, "data_path": lambda w: w.images, "eval_data_path": lambda w: w.images},
        **{"model": TOKENIZER, "input_size": 32, "teacher_input_size": 32},
        **{"codebook_n_emd": 16, "codebook_emd_dim": 8},
    ),
    "run_vqkd_training --train_pixel_decoder": lambda w: run_vqkd_training.main(
        [
            *as_flags(tokenizer_weight=w.file("tokenizer"), data_path=w.images, train_pixel_decoder=True),
            *as_flags(in_chans=w.flags["in_chans"], input_size=32, pixel_decoder_dim=32, epochs=1),
            *(as_flags(image_range="auto") if w.flags["image_range"] else []),
            *RUN,
        ]
    ),
    "export_checkpoint --to timm": exported("timm", "timm"),
    "export_checkpoint --to huggingface": exported("huggingface", "huggingface"),
    "export_checkpoint --to safetensors": exported("safetensors", "ours.safetensors"),
}


@pytest.fixture
def seen(monkeypatch):
    """The images that networks with patches of 16 pixels were shown."""
    original, images = PatchEmbed.embed_any_size, []

    def recorded(self, x):
        images.extend(x.detach() if self.patch_size == (16, 16) else ())
        return original(self, x)

    monkeypatch.setattr(PatchEmbed, "embed_any_size", recorded)
    return images


def colors_of(images):
    """(different images, channels), sorted; what is padded is in the minority."""
    colors = {
        tuple(round(value, 3) for value in x.flatten(1).median(dim=1).values.tolist()): x for x in images
    }
    return np.sort([x.flatten(1).median(dim=1).values.tolist() for x in colors.values()], axis=0)


@pytest.mark.parametrize("command", COMMANDS)
def test_images_are_seen_as_in_training(command, world, seen):
    seen.clear()
    COMMANDS[command](world)
    assert np.allclose(colors_of(seen), world.expected, atol=1e-4)


@pytest.mark.slow
def test_onnx_says_how_images_are_read(world):
    onnx = pytest.importorskip("onnx")
    path = world.out("x.onnx")
    export_checkpoint.main(as_flags(checkpoint=world.file("classifier"), to="onnx", output=path))
    model = onnx.load(path)
    facts = {entry.key: json.loads(entry.value) for entry in model.metadata_props}
    shape = [dim.dim_value for dim in model.graph.input[0].type.tensor_type.shape.dim]
    assert shape[1] == world.flags["in_chans"] and facts["image_range"] == world.flags["image_range"]
    assert [*facts["mean"], *facts["std"]] == world.flags["mean_std"]


def test_a_pixel_decoder_refuses_other_images(world, capsys):
    flags = as_flags(tokenizer_weight=world.file("tokenizer"), data_path=world.images, input_size=32)
    flags = [*flags, *RUN, "--train_pixel_decoder"]
    message = refused(run_vqkd_training.main, flags, capsys)
    give = f"give --in_chans {world.flags['in_chans']}"
    assert give in message
    flags, low_high = [*flags, *as_flags(in_chans=world.flags["in_chans"])], world.flags["image_range"]
    give += " --image_range -100 4000" if low_high else ", no --image_range"
    assert give in refused(run_vqkd_training.main, [*flags, "--image_range", "0", "99"], capsys)
    if low_high is None:  # `auto` would measure another range than that of the files' type
        assert give in refused(run_vqkd_training.main, [*flags, *as_flags(image_range="auto")], capsys)


def test_the_page_of_codes_shows_the_images_that_were_encoded(world, monkeypatch):
    COMMANDS["encode_images"](world)
    shown = []
    monkeypatch.setattr(
        visualize_codebook.drawing, "as_rgb", lambda x: shown.append(x) or torch.zeros(3, 32, 32)
    )
    visualize_codebook.main(as_flags(encoded=world.out("c"), output=world.out("page.html")))
    mean, std = np.split(np.array(world.flags["mean_std"]), 2)
    assert np.allclose(colors_of(shown), world.expected * std + mean, atol=1e-4)


OPENERS = (
    *("open_backbone", "open_frozen", "open_tokenizer", "open_model", "open_reconstructor"),
    *("read_classifier", "read_segmenter", "read_tokenizer"),
)
TESTED_ELSEWHERE = {"run_beitv2_pretraining"}  # test_channels.py


def test_every_command_that_opens_a_checkpoint_is_here():
    sources = {module_name(path): path.read_text() for path in library_files() if path.parent == ROOT}
    opening = {
        name
        for name, text in sources.items()
        if re.search("^def main", text, re.MULTILINE) and any(opener in text for opener in OPENERS)
    }
    assert opening - TESTED_ELSEWHERE <= {command.split()[0] for command in COMMANDS}
    assert len(opening) > 8
