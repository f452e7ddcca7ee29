"""Published command lines parse word for word, and every flag of theirs has its
published default.
"""

import argparse
import importlib
import re
import shlex
import sys

import pytest
from golden_values import GOLDEN
from refusals import refused
from source_files import ROOT, all_files

import arguments
import encode_images
import run_beitv2_pretraining
import run_class_finetuning
import run_linear_eval
import run_vqkd_training
import visualize_attention
import visualize_reconstruction
from flags.pretraining import student_grid

SCRIPTS = {
    "run_vqkd_training": run_vqkd_training,
    "run_beitv2_pretraining": run_beitv2_pretraining,
    "run_class_finetuning": run_class_finetuning,
}
# Defaults that differ from the published ones, each with its reason in
# docs/deviations.md.
DEVIATING = {
    ("run_beitv2_pretraining", "--num_mask_patches"),  # scaled to the grid: 75 of 196
    ("run_beitv2_pretraining", "--min_mask_patches_per_block"),  # the same: 16 on 14 x 14
    ("run_beitv2_pretraining", "--second_input_size"),  # what gives the model's grid: 224 for VQ-KD
    ("run_beitv2_pretraining", "--second_interpolation"),  # bicubic, as in the recipe
    # the teacher in the tokenizer's name; clip for the default one
    ("run_vqkd_training", "--teacher_model_type"),
    ("run_class_finetuning", "--eval_data_path"),  # '' rather than None
}


ENTRIES = {path.name for path in ROOT.glob("run_*_*.py")}  # their parsers are made in flags/
NO_PATHS = {  # texts that name something else
    "command",
    "gpu",
    "model",
    "opt",
    "dist_url",
    "device",
    "train_interpolation",
    "second_interpolation",
    "tokenizer_model",
    "aa",
    "teacher",
    "teacher_model_type",
    "model_key",
    "checkpoint_key",
    "image_range",  # numbers, or a word
    "mean_std",
    "model_prefix",
    "model_filter_name",
    "robust_test",
    "push_to_hub",
    "query",
    "names",
}


def parsers():
    """One of every script that has flags; each has `get_parser`."""
    for path in sorted(all_files()):
        makes_one = re.search(r"\b(ArgumentParser|new_parser)\(", path.read_text())
        is_its_home = path.parent.name == "flags" or path.stem in ("arguments", "config_files", "errors")
        if (makes_one and not is_its_home) or path.name in ENTRIES:
            yield path.stem, importlib.import_module(path.stem).get_parser()


def flags_that_take_values():
    for script, parser in PARSERS.items():
        for action in parser._actions:
            if action.nargs != 0 and not action.choices:
                yield script, parser, action


def is_numeric(action):
    return isinstance(action.type, arguments.Number) or action.type in (int, float, arguments.image_size)


def refused_words(parser, words, capsys):
    """What the terminal says of a command line that is refused."""
    with pytest.raises(SystemExit) as stop:
        parser.parse_args(words)
    assert stop.value.code == 2, words
    return capsys.readouterr().err


def flag_rows():
    for line in (GOLDEN / "flags.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.replace("\\|", "/").strip("|").split("|")]
        if line.startswith("| --") and not line.startswith("| ---"):
            for script, default in zip(SCRIPTS, cells[2:], strict=True):
                if default != "-":
                    yield script, cells[0], cells[1], default


def expected(kind: str, default: str):
    if default == "none" or default == "(required)":
        return None
    if kind in ("switch", "bool_flag"):
        return default == "True"
    if kind in ("int", "float"):
        return float(default)
    return default.strip("'").replace("/", "|") if kind == "str" else default


sys.path.append(str(ROOT / "scripts"))
PARSERS = dict(parsers())


def test_every_flag_is_a_number_within_bounds_a_path_or_a_name():
    kinds = {"Number": 0, "path": 0, "name": 0}
    for script, _, action in flags_that_take_values():
        name = (script, action.dest)
        if is_numeric(action) or action.dest == "layer":
            assert action.type not in (int, float), name
            kinds["Number"] += 1
            for value in (
                [action.default] if not isinstance(action.default, (list, tuple)) else action.default
            ):
                known = value not in (None, argparse.SUPPRESS)  # a second name has the first one's
                if known and not isinstance(value, tuple):
                    assert action.type(str(value)) == value, name
        elif action.dest in NO_PATHS:
            kinds["name"] += 1
        elif action.type is not arguments.true_or_false:
            assert action.type is arguments.expand_home, name
            kinds["path"] += 1
    assert min(kinds.values()) > 15, kinds


def test_every_flag_of_every_script_has_help():
    silent = [
        (script, action.option_strings)
        for script, parser in PARSERS.items()
        for action in parser._actions
        if not action.help
    ]
    assert silent == []


def test_numbers_that_are_not_finite_or_out_of_range_are_refused(capsys):
    """No flag of any script takes one of these, and each names itself."""
    tried = 0
    for script, parser, action in flags_that_take_values():
        if is_numeric(action) or action.dest == "layer":
            flag = action.option_strings[0]
            for value in (
                "nan",
                "inf",
                "-inf",
                "-1e9",
                "-1000000000",
                str(10**30),
                str(10**400),
                "9" * 5000,
                "1e400",
                "",
                "x",
            ):
                error = refused_words(parser, [f"{flag}={value}"], capsys)
                assert f"argument {'/'.join(action.option_strings)}: " in error, (script, flag, value)
                assert len(error.splitlines()[-1]) < 300, (script, flag, value)
                tried += 1
            if action.nargs is not None:
                assert f"argument {flag}: 'nan' is not a" in refused_words(
                    parser, [flag, "0.5" if action.type.kind is float else "5", "nan"], capsys
                )
    assert tried > 1000


@pytest.mark.parametrize(
    ("script", "words", "message"),
    [
        ("run_beitv2_pretraining", "--lr=-1", "argument --lr: '-1' is not a number from 0 to 1e+09"),
        (
            "run_beitv2_pretraining",
            "--drop_path 1",
            "argument --drop_path: '1' is not a number from 0 and below 1",
        ),
        (
            "run_beitv2_pretraining",
            "--seed -1",
            "argument --seed: '-1' is not a whole number from 0 to 4,294,967,295",
        ),
        ("run_class_finetuning", "--smoothing 2", "argument --smoothing: '2' is not"),
        ("run_class_finetuning", "--mixup nan", "argument --mixup: 'nan' is not"),
        ("run_segmentation_finetuning", "--aux_weight inf", "argument --aux_weight: 'inf' is not"),
        ("run_segmentation_finetuning", "--eval_scales 1 1e400", "argument --eval_scales: '1e400' is not"),
    ],
)
def test_what_a_refused_number_is_told(script, words, message, capsys):
    assert message in refused_words(PARSERS[script], words.split(), capsys)


def test_numbers_of_published_lines_are_taken():
    words = (
        "--data_path x --warmup_steps -1 --drop_path 0 --layer_decay 1.0 --clip_grad 3.0 --opt_betas 0.9 "
        "0.98 --local_rank -1"
    )
    args = arguments.parse(run_class_finetuning.get_parser(), words.split())
    assert (args.warmup_steps, args.drop_path, args.layer_decay, args.local_rank) == (-1, 0.0, 1.0, -1)
    assert arguments.parse(run_class_finetuning.get_parser(), ["--data_path", "x"]).clip_grad is None


def test_a_tilde_is_the_home_folder_for_every_path(monkeypatch, capsys):
    monkeypatch.setenv("HOME", "/home/somebody")
    for script, parser, action in flags_that_take_values():
        if action.type is not arguments.expand_home:
            continue
        if action.option_strings:
            flag = action.option_strings[0]
            assert "NUL" in refused_words(parser, [f"{flag}=a\0b"], capsys), (script, flag)
            names = "/".join(action.option_strings)
            assert f"{names}: '~nobody-of-this-name/x'" in refused_words(
                parser, [f"{flag}=~nobody-of-this-name/x"], capsys
            )
        assert parser._get_values(action, ["~/x"]) in ("/home/somebody/x", ["/home/somebody/x"]), (
            script,
            action.dest,
        )
    assert arguments.expand_home("~/a.tar::b::~/c") == "/home/somebody/a.tar::b::/home/somebody/c"
    assert arguments.expand_home("https://a.b/c?~d") == "https://a.b/c?~d"


@pytest.mark.parametrize(("script", "flag", "kind", "default"), list(flag_rows()))
def test_published_flags_and_defaults(script, flag, kind, default):
    parser = SCRIPTS[script].get_parser()
    action = parser._option_string_actions.get(flag)
    assert action is not None, f"{script} does not accept {flag}"
    if (script, flag) not in DEVIATING and "://" not in default:
        assert action.default == expected(kind, default)


@pytest.mark.parametrize(
    ("module", "flag", "takes"),
    [
        (run_vqkd_training, "--resume", arguments.WEIGHTS),
        (run_vqkd_training, "--teacher_weight", arguments.FILE_OR_URL),
        (run_vqkd_training, "--tokenizer_weight", arguments.WEIGHTS),
        (run_beitv2_pretraining, "--resume", arguments.WEIGHTS),
        (run_beitv2_pretraining, "--tokenizer_weight", arguments.WEIGHTS),
        (run_class_finetuning, "--resume", arguments.WEIGHTS),
        (run_class_finetuning, "--finetune", arguments.WEIGHTS),
        (run_linear_eval, "--finetune", arguments.WEIGHTS),
        (encode_images, "--tokenizer_weight", arguments.WEIGHTS),
        (visualize_attention, "--checkpoint", arguments.WEIGHTS),
        (visualize_reconstruction, "--checkpoint", arguments.FILE_OR_URL),
    ],
)
def test_flags_for_weights_say_alike_what_they_take(module, flag, takes):
    assert takes in module.get_parser()._option_string_actions[flag].help


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_begins_with_an_example_and_hides_obsolete_flags(script):
    parser = SCRIPTS[script].get_parser()
    text = parser.format_help()
    example = re.match(r"usage: python \S+ ((?:.+\\\n)?.+)\n\n", text)
    args = parser.parse_args(example[1].replace("\\\n", " ").split())
    assert arguments.changed_flags(parser, args)
    for action in parser._actions:
        assert (action.help == argparse.SUPPRESS) == (action.dest in arguments.OBSOLETE), action.dest
    for noise in ("(default: None)", "(default: )", "(default: False)"):
        assert noise not in text


def seed_commands():
    text = (GOLDEN / "beitv2_pretraining_guide.txt").read_text()
    return re.findall(r"```bash\n(python .*?)```", text, flags=re.DOTALL)


@pytest.mark.parametrize("command", seed_commands())
def test_the_commands_of_the_guide_parse_word_for_word(command):
    words = shlex.split(command.replace("{0, 1, 2, 3}", "0"))
    script = words.index("run_beitv2_pretraining.py")
    assert words[:3] == ["python", "-m", "torch.distributed.launch"]
    args = arguments.parse(run_beitv2_pretraining.get_parser(), [*words[script + 1 :], "--local-rank=3"])
    assert args.lr == 1.5e-3
    assert args.epochs == 1600
    assert args.opt_betas == [0.9, 0.999]
    assert args.shared_lm_head is True
    assert args.tokenizer_weight.endswith("%3D")
    assert args.early_layers == (9 if "base" in args.model else 21)
    assert student_grid(args) == 14


def test_a_blank_after_a_backslash_is_no_argument():
    args = arguments.parse(
        run_beitv2_pretraining.get_parser(), ["--data_path", "x", " ", "--log_dir", "", "\n"]
    )
    assert (args.data_path, args.log_dir) == ("x", "")


def test_there_are_two_commands_in_the_guide():
    assert len(seed_commands()) == 2


def test_flags_are_read_only_and_changes_are_listed():
    parser = run_beitv2_pretraining.get_parser()
    args = arguments.parse(parser, ["--data_path", "x", "--lr", "1e-3", "--shared_lm_head", "false"])
    assert arguments.changed_flags(parser, args) == {"data_path": "x", "lr": 1e-3, "shared_lm_head": False}
    with pytest.raises(AttributeError, match="read-only"):
        args.lr = 1.0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--input_size", "225"], "--input_size 225 is not a multiple"),
        (["--second_input_size", "112"], "--second_input_size 112 .* use 224"),
        (["--num_mask_patches", "197"], "--num_mask_patches 197: the image has 14 x 14 patches"),
        (["--opt_betas", "0.9"], "--opt_betas takes two numbers for adamw"),
        (
            ["--model", "beit_base_patch16_224_8k_vocab_cls_pt", "--early_layers", "13"],
            "--early_layers 13 must lie .* depth, 12",
        ),
        (
            ["--tokenizer_model", "vqkd_encoder_base_decoder_2x768x12_clip"],
            "did you mean vqkd_encoder_base_decoder_",
        ),
        (["--model", "beit_bose_patch16_224_8k_vocab"], "did you mean beit_base_patch16_224_8k_vocab"),
    ],
)
def test_impossible_combinations_are_refused_with_one_sentence(flags, message, capsys):
    error = refused(run_beitv2_pretraining.main, ["--data_path", "/nowhere", *flags], capsys)
    assert re.search(message, error)
    assert "Traceback" not in error


def test_obsolete_flags_warn(caplog):
    parser = run_class_finetuning.get_parser()
    args = arguments.parse(
        parser, ["--data_path", "x", "--resplit", "--enable_deepspeed", "--warmup_lr", "0.1"]
    )
    import logging

    logging.getLogger("beit").propagate = True
    with caplog.at_level("WARNING", logger="beit"):
        arguments.warn_of_obsolete_flags(parser, args)
    assert {record.message.split()[1] for record in caplog.records} == {
        "--resplit",
        "--enable_deepspeed",
        "--warmup_lr",
    }
