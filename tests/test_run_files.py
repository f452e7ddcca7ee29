"""What outlives a run beside its checkpoints: metrics.jsonl and environment.json."""

import json
import math

import pytest
import torch
from many_processes import two_processes
from refusals import refused
from tiny_runs import (
    SIZE,
    as_flags,
    checkpoint,
    finetuning_flags,
    kill_after,
    labeled_pixels,
    pretraining_flags,
    segmentation_flags,
    spoil_loss,
    student,
    vqkd_flags,
)

import engine_for_finetuning
import run_beitv2_pretraining
import run_class_finetuning
import run_linear_eval
import run_segmentation_finetuning
import run_vqkd_training
from monitoring.reporter import Reporter
from monitoring.run_files import finite_only

KEYS = "step images loss lr grad_norm images_per_second data_wait memory skipped".split()
TIMED = {"images_per_second", "data_wait", "memory", "mfu"}  # else a resumed run repeats them


def refuse_constant(name):
    raise ValueError(f"{name} is no JSON")


def metrics(out):
    lines = (out / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=refuse_constant) for line in lines]


def untimed(lines):
    return [{name: value for name, value in line.items() if name not in TIMED} for line in lines]


def pixel_decoder_flags(data, out, tokenizer_weight, *more):
    flags = as_flags(data_path=data, train_pixel_decoder=True, tokenizer_weight=tokenizer_weight)
    flags += as_flags(output_dir=out, pixel_decoder_dim=32, batch_size=4, epochs=2, lr=1e-3)
    return [*flags, *SIZE, *more]


def linear_flags(data, out, weights, *more):
    flags = as_flags(data_set="image_folder", data_path=data, eval_data_path=data, output_dir=out)
    return [*flags, *SIZE, *as_flags(finetune=weights, batch_size=4, epochs=2, lr=0.1), *more]


@pytest.fixture(scope="module")
def stages(data, tokenizer_weight, tmp_path_factory):
    """Name -> (main, its flags for an output folder): 8 steps of 4 images, but 6 of 2."""
    folder = tmp_path_factory.mktemp("files")
    weights, pairs = student(folder / "student.pth"), labeled_pixels(folder / "pairs")
    return {
        "vqkd": (run_vqkd_training.main, lambda out, *more: vqkd_flags(data, out, *more)),
        "pretraining": (
            run_beitv2_pretraining.main,
            lambda out, *more: pretraining_flags(data, out, tokenizer_weight, *more),
        ),
        "finetuning": (run_class_finetuning.main, lambda out, *more: finetuning_flags(data, out, *more)),
        "segmentation": (
            run_segmentation_finetuning.main,
            lambda out, *more: segmentation_flags(pairs, out, *more),
        ),
        "linear probe": (run_linear_eval.main, lambda out, *more: linear_flags(data, out, weights, *more)),
        "pixel decoder": (
            run_vqkd_training.main,
            lambda out, *more: pixel_decoder_flags(data, out, tokenizer_weight, *more),
        ),
    }


STAGES = ("vqkd", "pretraining", "finetuning", "segmentation", "linear probe", "pixel decoder")


@pytest.mark.parametrize("stage", STAGES)
def test_each_stage_goes_on_with_its_figures(stage, stages, tmp_path, monkeypatch):
    """Killed between two reports, behind one that the resumed run takes again."""
    main, flags = stages[stage]
    often = as_flags(print_freq=2, save_ckpt_steps=3)
    main(flags(tmp_path / "whole", *often))
    with monkeypatch.context() as patched:
        kill_after(5, patched)
        with pytest.raises(KeyboardInterrupt):
            main(flags(tmp_path / "killed", *often))
    assert [line["step"] for line in metrics(tmp_path / "killed")] in ([2, 4], [2, 3, 4])
    main(flags(tmp_path / "killed", *often))
    whole, killed = metrics(tmp_path / "whole"), metrics(tmp_path / "killed")
    assert untimed(killed) == untimed(whole)
    steps, images = ([2, 3, 4, 6], 2) if stage == "segmentation" else ([2, 4, 6, 8], 4)
    assert [line["step"] for line in whole] == steps
    assert [line["images"] for line in whole] == [images * step for step in steps]
    assert all(set(KEYS) <= line.keys() for line in whole)
    assert all(0 <= line["data_wait"] <= 1 and line["images_per_second"] > 0 for line in whole)
    if stage == "vqkd":
        assert all(1 <= line["perplexity"] <= line["codes_used"] <= 16 for line in whole)


def test_another_print_freq_on_resume_gives_each_step_once(stages, tmp_path, monkeypatch):
    main, flags = stages["finetuning"]
    main(flags(tmp_path / "whole", *as_flags(print_freq=3)))
    with monkeypatch.context() as patched:
        kill_after(5, patched)
        with pytest.raises(KeyboardInterrupt):
            main(flags(tmp_path / "killed", *as_flags(print_freq=1, save_ckpt_steps=4)))
    main(flags(tmp_path / "killed", *as_flags(print_freq=3)))
    whole, killed = metrics(tmp_path / "whole"), metrics(tmp_path / "killed")
    assert [line["step"] for line in killed] == [1, 2, 3, 4, 6, 8]
    assert untimed(killed)[-2:] == untimed(whole)[-2:]  # of the second epoch, steps 5 to 6 and 7 to 8


def test_two_processes_write_one_line_a_report(data, tmp_path):
    flags = [*as_flags(print_freq=2, epochs=1), "--batch_size", "2"]
    two_processes("run_class_finetuning.py", finetuning_flags(data, tmp_path, *flags))
    assert [(line["step"], line["images"]) for line in metrics(tmp_path)] == [(2, 8), (4, 16)]


def test_images_are_those_that_were_seen(stages, tmp_path):
    """Batches that shrink to the images there are, and a batch of another size on
    resume.
    """
    main, flags = stages["finetuning"]
    main(flags(tmp_path / "shrunk", *as_flags(batch_size=100)))
    assert [(line["step"], line["images"]) for line in metrics(tmp_path / "shrunk")] == [(1, 16), (2, 32)]
    main(flags(tmp_path / "other", *as_flags(epochs=1)))
    main(flags(tmp_path / "other", *as_flags(batch_size=8)))
    assert [(line["step"], line["images"]) for line in metrics(tmp_path / "other")] == [(4, 16), (6, 32)]


def test_a_checkpoint_of_earlier_code_counts_its_images(stages, tmp_path):
    main, flags = stages["finetuning"]
    main(flags(tmp_path, *as_flags(epochs=1)))
    content = checkpoint(tmp_path / "checkpoint.pth")
    del content["next"]["images"], content["skipped"]
    torch.save(content, tmp_path / "checkpoint.pth")
    main(flags(tmp_path))
    assert [line["images"] for line in metrics(tmp_path)] == [16, 32]


def test_skipped_steps_are_counted_and_no_figure_is_nan(stages, tmp_path, monkeypatch):
    main, flags = stages["finetuning"]
    once = as_flags(print_freq=1, epochs=1)
    with monkeypatch.context() as patched:
        spoil_loss(patched, engine_for_finetuning.FinetuningStage, steps={1, 3})
        main(flags(tmp_path, *once, *as_flags(save_ckpt_steps=1)))
    lines = metrics(tmp_path)
    assert [line["skipped"] for line in lines] == [0, 1, 1, 2]
    assert [line["loss"] is None for line in lines] == [False, True, False, True]
    assert checkpoint(tmp_path / "checkpoint.pth")["skipped"] == 2
    main(flags(tmp_path))
    assert metrics(tmp_path)[-1]["skipped"] == 2


def test_fp16_says_by_what_the_loss_is_scaled(stages, tmp_path):
    main, flags = stages["finetuning"]
    main(flags(tmp_path, *as_flags(amp_dtype="fp16", epochs=1)))
    assert metrics(tmp_path)[-1]["loss_scale"] == 65536


def test_figures_that_are_not_finite_are_null():
    line = {"a": math.nan, "b": math.inf, "c": -math.inf, "d": 1.5, "e": 3, "f": None}
    assert finite_only(line) == {"a": None, "b": None, "c": None, "d": 1.5, "e": 3, "f": None}


def test_the_codebook_has_no_figures_before_there_is_one(stages, tmp_path):
    main, flags = stages["vqkd"]
    main(flags(tmp_path, *as_flags(print_freq=1, epochs=30, quantizer_warmup_steps=2, codebook_n_emd=4)))
    used = [line["codes_used"] for line in metrics(tmp_path)]
    assert used[:2] == [None, None]
    assert all(1 <= number <= 4 for number in used[-4:])


@pytest.mark.parametrize("name", ["metrics.jsonl", "log.txt"])
def test_a_file_that_cannot_be_written_ends_in_a_sentence(name, stages, tmp_path, capsys, monkeypatch):
    main, flags = stages["finetuning"]
    start = Reporter.start_epoch

    def taken(self, *args):
        start(self, *args)
        (tmp_path / name).mkdir()

    monkeypatch.setattr(Reporter, "start_epoch", taken)
    error = refused(main, flags(tmp_path), capsys)
    assert name in error
    assert "could not be written" in error


def test_a_line_cut_by_a_kill_is_replaced(stages, tmp_path):
    main, flags = stages["finetuning"]
    main(flags(tmp_path, *as_flags(epochs=1, print_freq=2)))
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "im')
    main(flags(tmp_path, *as_flags(print_freq=2)))
    assert [line["step"] for line in metrics(tmp_path)] == [2, 4, 6, 8]


def test_a_new_run_in_the_same_folder_sets_the_old_figures_aside(stages, tmp_path):
    main, flags = stages["finetuning"]
    for _ in range(2):
        main(flags(tmp_path, *as_flags(epochs=1, no_auto_resume=True)))
    assert [line["step"] for line in metrics(tmp_path)] == [4]
    assert len(list(tmp_path.glob("metrics-until-*.jsonl"))) == 1
