"""Published command lines parse word for word, and every flag of theirs has its published default."""

import re
import shlex

import pytest
import torch
from golden_values import GOLDEN

import arguments
import encode_images
import run_beitv2_pretraining
import run_class_finetuning
import run_linear_eval
import run_vqkd_training
import visualize_attention
import visualize_reconstruction

SCRIPTS = {
    "run_vqkd_training": run_vqkd_training,
    "run_beitv2_pretraining": run_beitv2_pretraining,
    "run_class_finetuning": run_class_finetuning,
}
# Defaults that differ from the published ones, each with its reason in docs/deviations.md.
DEVIATING = {
    ("run_beitv2_pretraining", "--num_mask_patches"),  # scaled to the grid: 75 of 196
    ("run_beitv2_pretraining", "--min_mask_patches_per_block"),  # the same: 16 on 14 x 14
    ("run_beitv2_pretraining", "--second_input_size"),  # what gives the model's grid: 224 for VQ-KD
    ("run_beitv2_pretraining", "--second_interpolation"),  # bicubic, as in the recipe
    ("run_vqkd_training", "--teacher_model_type"),  # the teacher in the tokenizer's name; clip for the default one
    ("run_class_finetuning", "--eval_data_path"),  # '' rather than None
}


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
def test_every_flag_has_an_effect_or_says_that_it_has_none(script):
    for action in SCRIPTS[script].get_parser()._actions:
        if action.dest in arguments.OBSOLETE:
            assert "does nothing" in action.help, action.dest


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
    assert run_beitv2_pretraining.patch_grid(args) == 14


def test_a_blank_after_a_backslash_is_no_argument():
    args = arguments.parse(run_beitv2_pretraining.get_parser(), ["--data_path", "x", " ", "--log_dir", "", "\n"])
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
        (["--tokenizer_model", "vqkd_encoder_base_decoder_2x768x12_clip"], "did you mean vqkd_encoder_base_decoder_"),
        (["--model", "beit_bose_patch16_224_8k_vocab"], "did you mean beit_base_patch16_224_8k_vocab"),
    ],
)
def test_impossible_combinations_are_refused_with_one_sentence(flags, message, capsys):
    with pytest.raises(SystemExit) as stop:
        run_beitv2_pretraining.main(["--data_path", "/nowhere", *flags])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert re.search(message, error)
    assert "Traceback" not in error


def test_obsolete_flags_warn(caplog):
    parser = run_class_finetuning.get_parser()
    args = arguments.parse(parser, ["--data_path", "x", "--resplit", "--enable_deepspeed", "--warmup_lr", "0.1"])
    import logging

    logging.getLogger("beit").propagate = True
    with caplog.at_level("WARNING", logger="beit"):
        arguments.warn_of_obsolete_flags(parser, args)
    assert {record.message.split()[1] for record in caplog.records} == {"--resplit", "--enable_deepspeed", "--warmup_lr"}


def test_a_missing_gpu_is_no_crash():
    import distributed

    if not torch.cuda.is_available():
        assert distributed.pick_device("cuda").type == "cpu"


def test_a_gpu_too_old_for_this_torch_is_named():
    import distributed
    from errors import UserError

    distributed.refuse_gpus_without_kernels((9, 0), ["sm_75", "sm_80", "sm_90a", "compute_120"])
    distributed.refuse_gpus_without_kernels((7, 0), ["sm_50", "sm_70"])
    with pytest.raises(UserError, match=r"7\.0 .*cu126"):
        distributed.refuse_gpus_without_kernels((7, 0), ["sm_75", "sm_80"])
