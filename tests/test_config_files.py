"""--config: flags from a file mean what they mean on a command line, and a run's
flags.json gives the same run.
"""

import json
import re

import pytest
from refusals import refused
from tiny_classifier import classifier, eval_flags
from tiny_runs import assert_same_weights, checkpoint, finetuning_flags

import arguments
import encode_images
import run_beitv2_pretraining
import run_class_finetuning
import run_linear_eval
import run_segmentation_finetuning
import run_vqkd_training
import visualize_codebook

LINES = {
    run_beitv2_pretraining: "--data_path a --lr 1.5e-3 --opt_betas 0.9 0.98 --shared_lm_head False",
    run_vqkd_training: "--data_path a --standardize_teacher on --no_pin_mem --warmup_epochs 2.5",
    run_class_finetuning: "--data_path a --input_size 32x64 --use_cls --cutmix_minmax 0.1 0.5 --aa=",
    run_segmentation_finetuning: "--data_path a --eval_scales 0.5 1.0 --sliding_windows --clip_grad 3",
    run_linear_eval: "--data_path a --finetune b --knn --knn_k 3 5",
    encode_images: "--tokenizer_weight a --data_path b --output_dir c",
    visualize_codebook: "--encoded a --output b",
}


def written(path, text):
    path.write_text(text if isinstance(text, str) else json.dumps(text))
    return str(path)


@pytest.mark.parametrize("entry", LINES, ids=lambda entry: entry.__name__)
@pytest.mark.parametrize("given_only", [False, True])
def test_a_file_of_flags_gives_the_same_flags(entry, given_only, tmp_path):
    args = arguments.parse(entry.get_parser(), LINES[entry].split())
    path = written(tmp_path / "flags.json", args.to_config(given_only))
    again = arguments.parse(entry.get_parser(), ["--config", path])
    assert again.plain() == args.plain()
    assert again.given == args.given if given_only else again.given > args.given


def test_the_command_line_and_then_the_last_file_win(tmp_path):
    first = written(tmp_path / "a.yaml", "mode: knn\nepochs: 3\nknn_k: [1, 2]\nlr: 1e-2\nseed: 4")
    second = written(tmp_path / "b.json", {"lr": 0.5, "seed": 5})
    words = ["--data_path", "x", "--linear", "--config", first, f"--config={second}", "--seed", "6"]
    args = arguments.parse(run_linear_eval.get_parser(), [*words, "--finetune", "y"])
    # --linear cannot stand beside --knn, so that the file's goes
    assert (args.mode, args.epochs, args.knn_k, args.lr, args.seed) == ("linear", 3, [1, 2], 0.5, 6)
    assert args.given == {"data_path", "finetune", "mode", "epochs", "knn_k", "lr", "seed"}


def test_yaml_says_on_no_and_null(tmp_path):
    path = written(
        tmp_path / "flags.yaml",
        "data_path: a\nstandardize_teacher: off\nno_auto_resume: yes\npin_mem: no\nlog_dir:\nclip_grad: ~\n"
        "lr: 1e-3  # a text for YAML\n--min_lr: 0\nlocal-rank: 2\nopt_betas: [0.9, 0.95]\n",
    )
    args = arguments.parse(run_vqkd_training.get_parser(), ["--config", path])
    assert (args.standardize_teacher, args.auto_resume, args.pin_mem) == ("off", False, False)
    assert (args.log_dir, args.clip_grad, args.lr, args.min_lr) == (None, None, 1e-3, 0)
    assert (args.local_rank, args.opt_betas) == (2, [0.9, 0.95])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lrr: 1", "lrr is no flag of .*; did you mean lr?"),
        ("config: other.yaml", "config is no flag"),
        ("lr: fast", "argument --lr: 'fast' is not a number from 0"),
        ("lr: [1, 2]", "lr takes a value, not a list"),
        ("lr: {a: 1}", "lr takes a value, not dict"),
        ("opt_betas: [[1]]", "opt_betas takes values, not a list"),
        ("opt: true", "opt takes a value, not true"),
        ("rel_pos_bias: 3", "rel_pos_bias is a switch: it takes false or true, not 3"),
        ("lr: 1\nlr: 2", "lr is given twice"),
        ("qkv_bias: true\ndisable_qkv_bias: true", "disable_qkv_bias is a flag that another line gives"),
        ("- lr", "a line 'flag: value' for each flag is expected"),
        ("lr: [", "neither JSON .* nor YAML"),
        ("lr: !!python/object/apply:os.system [ls]", "neither JSON .* nor YAML"),
    ],
)
def test_what_a_file_cannot_say_is_one_sentence(text, message, tmp_path, capsys):
    path = written(tmp_path / "flags.yaml", text)
    error = refused(run_class_finetuning.main, ["--data_path", "x", "--config", path], capsys)
    assert error.startswith(f"error: --config {path}: ")
    assert re.search(message, error), error


def test_a_file_that_is_missing_or_no_json_is_named(tmp_path, capsys):
    missing = refused(run_class_finetuning.main, ["--config", str(tmp_path / "no.yaml")], capsys)
    assert "no.yaml: cannot be read (No such file" in missing
    path = written(tmp_path / "a.json", '{"lr": 1, "lr": 2}')
    assert "lr is given twice" in refused(run_class_finetuning.main, ["--config", path], capsys)
    assert "expected one argument" in refused(run_class_finetuning.main, ["--config"], capsys)


def test_help_beside_a_file_is_the_help(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        arguments.parse(run_class_finetuning.get_parser(), ["--config", str(tmp_path / "none"), "--help"])
    assert stop.value.code == 0
    assert "--config FILE" in capsys.readouterr().out


@pytest.mark.slow
def test_a_runs_flags_give_the_run_bit_for_bit(data, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    run_class_finetuning.main(finetuning_flags(data, first, "--mixup", "0.8", "--disable_rel_pos_bias"))
    flags = json.loads((first / "flags.json").read_text())
    assert (flags["mixup"], flags["rel_pos_bias"], flags["seed"]) == (0.8, False, 0)
    assert not flags.keys() & arguments.OBSOLETE.keys()
    run_class_finetuning.main(["--config", str(first / "flags.json"), "--output_dir", str(second)])
    assert_same_weights(first / "checkpoint.pth", second / "checkpoint.pth")
    theirs, ours = (checkpoint(out / "checkpoint.pth")["args"] for out in (first, second))
    assert {name for name in ours if ours[name] != theirs[name]} == {"output_dir"}


def test_an_evaluation_keeps_what_it_was_given(data, tmp_path):
    classifier(2, tmp_path / "model.pth")
    more = ["--resume", str(tmp_path / "model.pth"), "--tta_flip"]
    out = tmp_path / "out"
    run_class_finetuning.main(eval_flags(data, out, *more))
    flags = json.loads((out / "flags.json").read_text())
    assert flags["eval"] is True and flags["tta_flip"] is True and "lr" not in flags
    before = (out / "eval.json").read_text()
    run_class_finetuning.main(["--config", str(out / "flags.json")])
    assert (out / "eval.json").read_text() == before
    # beside a checkpoint lie the flags of its training
    (out / "checkpoint.pth").touch()
    run_class_finetuning.main(["--config", str(out / "flags.json"), "--worst_classes", "1"])
    assert json.loads((out / "flags.json").read_text()) == flags
