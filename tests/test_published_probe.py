"""BEiT v1's linear probe: its flags, and its classifiers to the digits of plain
torch.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from refusals import refused
from test_linear_eval import flags
from tiny_runs import SIZE, as_flags, assert_same_weights, checkpoint, log_lines, student
from torch import nn

import run_linear_eval
from flags.linear_eval import get_parser_for, parse_flags

# `python -m torch.distributed.launch run_linear_eval.py` and then, with every flag there is
PUBLISHED = """--model beit_base_patch16_224 --pretrained_weights b.pth --checkpoint_key model|module
--avgpool_patchtokens True --abs_pos_emb --disable_rel_pos_bias --layer_scale_init_value 0.1 --patch_size 16
--optimizer adamw --epochs 100 --base_lr 0.002 --batch_size_per_gpu 256 --dist_url env:// --local_rank 0
--data_path d --num_workers 10 --val_freq 2 --output_dir o --num_labels 1000
--imagenet_default_mean_and_std True --amp_forward False""".split()
REQUIRED = ["--data_path", "d", "--pretrained_weights", "b.pth"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return student(tmp_path_factory.mktemp("weights") / "student.pth")


def probe(data, weights, out, *more):
    """As the published line, on the tiny data."""
    where = as_flags(data_set="image_folder", data_path=data, eval_data_path=data, output_dir=out)
    lines = as_flags(pretrained_weights=weights, batch_size_per_gpu=8, epochs=3, base_lr=1.0)
    return [*where, *SIZE, *lines, *more]


def test_the_published_line_is_taken_word_for_word():
    args = parse_flags(PUBLISHED)
    assert (args.protocol, args.finetune, args.checkpoint_key) == ("published", "b.pth", "model|module")
    assert (args.batch_size, args.eval_freq, args.nb_classes, args.opt) == (256, 2, 1000, "adamw")
    assert (args.amp_dtype, args.imagenet_default_mean_and_std, args.base_lr) == ("fp32", True, 0.002)


def test_its_defaults_come_with_its_flags():
    args = parse_flags(REQUIRED)
    assert (args.protocol, args.features, args.batch_size, args.epochs) == ("published", "cls_mean", 128, 100)
    assert (args.lr, args.base_lr, args.weight_decay, args.min_lr) == (None, 1e-3, 1e-4, 0.0)
    assert (args.train_interpolation, args.warmup_epochs, args.output_dir) == ("bilinear", 0, "")
    assert parse_flags([*REQUIRED, "--optimizer", "sgd"]).weight_decay == 0.0
    assert parse_flags([*REQUIRED, "--imagenet_default_mean_and_std", "False"]).protocol == "published"
    ours = parse_flags(["--data_path", "d", "--finetune", "b.pth", "--imagenet_default_mean_and_std"])
    assert (ours.protocol, ours.features, ours.batch_size, ours.lr) == ("ours", "auto", 64, 1e-3)
    assert (ours.weight_decay, ours.train_interpolation, ours.output_dir) == (0.0, "bicubic", "")
    assert ours.imagenet_default_mean_and_std is True
    # by name, whoever's flags are given
    assert parse_flags([*REQUIRED, "--protocol", "ours"]).lr == 1e-3
    assert parse_flags([*REQUIRED[:2], "--finetune", "b", "--protocol", "published"]).weight_decay == 1e-4
    assert parse_flags([*REQUIRED, "--knn"]).protocol == "ours"


def test_the_classifiers_are_those_of_plain_torch(data, weights, tmp_path):
    args = parse_flags(probe(data, weights, tmp_path))
    trainer = run_linear_eval.build(args)
    state, encode = trainer.state, trainer.stage.encode
    heads = copy.deepcopy(state.model)
    drawn = torch.stack([head.weight.detach() for head in heads.heads])
    assert drawn.shape == (6, 2, 256)
    assert float(drawn.std()) == pytest.approx(0.01, rel=0.05)
    assert not any(head.bias.any() for head in heads.heads)

    mine = [nn.Linear(256, 2) for _ in heads.heads]
    for own, head in zip(mine, heads.heads, strict=True):
        own.load_state_dict(head.state_dict())
    parameters = [parameter for own in mine for parameter in own.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1.0 * 8 / 256, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=3, eta_min=0)
    for epoch in range(3):
        trainer.data.sampler.set_position(epoch)
        for batch in trainer.data.loader:  # two of eight images
            features = encode(batch["image"])  # raw
            losses = [F.cross_entropy(own(features[:, i]), batch["label"]) for i, own in enumerate(mine)]
            optimizer.zero_grad()
            sum(losses).backward()
            optimizer.step()
        schedule.step()
    trainer.fit()
    assert state.step == 6
    for own, head in zip(mine, state.model.heads, strict=True):
        torch.testing.assert_close(own.weight, head.weight, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(own.bias, head.bias, rtol=1e-5, atol=1e-6)
    rates = [line["train_lr"] for line in log_lines(tmp_path)]
    assert rates == pytest.approx([1 / 32, 0.75 / 32, 0.25 / 32])


@pytest.mark.parametrize(
    ("more", "rate"), [([], 8 / 256), (["--base_lr", "0.5"], 4 / 256), (["--lr", "0.25"], 0.25)]
)
def test_lr_is_absolute_and_base_lr_is_for_256_images(more, rate, data, weights, tmp_path):
    trainer = run_linear_eval.build(parse_flags(probe(data, weights, "", *more)))
    assert trainer.schedule.lr.tolist() == pytest.approx([rate] * 2 + [0.75 * rate] * 2 + [0.25 * rate] * 2)
    (group,) = trainer.state.optimizer.param_groups  # biases decay too
    assert (group["weight_decay"], len(group["params"])) == (1e-4, 12)


def test_sgd_is_plain_momentum(data, weights):
    trainer = run_linear_eval.build(parse_flags(probe(data, weights, "", "--optimizer", "sgd")))
    optimizer = trainer.state.optimizer
    assert type(optimizer) is torch.optim.SGD
    (group,) = optimizer.param_groups
    assert (group["momentum"], group["nesterov"], group["weight_decay"]) == (0.9, False, 0.0)


def test_a_resumed_probe_ends_bit_for_bit(data, weights, tmp_path, capsys):
    more = ["--save_ckpt_freq", "1"]
    run_linear_eval.main(probe(data, weights, tmp_path / "whole", *more))
    first = ["--resume", str(tmp_path / "whole/checkpoint-0.pth")]
    run_linear_eval.main(probe(data, weights, tmp_path / "resumed", *more, *first))
    assert_same_weights(tmp_path / "whole/checkpoint.pth", tmp_path / "resumed/checkpoint.pth")
    content = checkpoint(tmp_path / "whole/checkpoint.pth")
    assert not content["model"]["mean"].any() and (content["model"]["std"] == 1).all()
    # the other protocol has other groups of parameters, other features another width
    other = ["--protocol", "ours", "--features", "cls_mean", "--lr", "1"]
    error = refused(run_linear_eval.main, probe(data, weights, tmp_path / "whole", *other), capsys)
    assert "was trained with --protocol published (now ours), so its weights or its optimizer" in error
    assert "give the flags as they were, or start a new run: another --output_dir" in error
    again = probe(data, weights, tmp_path / "whole", "--features", "cls")
    assert "trained with --features cls_mean (now cls), so" in refused(run_linear_eval.main, again, capsys)


def test_flags_that_do_nothing_say_so(data, weights, capsys):
    more = ["--abs_pos_emb", "--patch_size", "8", "--lr", "0.1", "--base_lr", "0.2", "--epochs", "1"]
    run_linear_eval.main(probe(data, weights, "", *more))
    said = capsys.readouterr().out
    assert "protocol   published" in said
    assert "--abs_pos_emb, --patch_size do nothing here: the backbone is built from what its file" in said
    assert "--base_lr does nothing here: --lr says the rate" in said
    run_linear_eval.main(probe(data, weights, "", "--protocol", "ours", "--base_lr", "3", "--epochs", "1"))
    assert "--base_lr does nothing here: --protocol ours has --lr" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--model", "beit_base_patch16_224"], "holds 6 blocks of 128 channels, not 12 of 768"),
        (["--model", "beit_bass"], "unknown model 'beit_bass'; did you mean"),
        (["--avgpool_patchtokens", "False"], "was never supported: --features cls"),
        (["--amp_forward", "False", "--amp_dtype", "bf16"], "--amp_forward False asks for fp32"),
        (["--cached_features"], "--cached_features takes center crops, --protocol published random ones"),
        (["--warmup_steps", "3"], "the rate of --protocol published changes once an epoch"),
        (["--knn", "--protocol", "published"], "--protocol published is a linear probe"),
    ],
)
def test_what_the_protocol_cannot_do_is_refused(more, message, data, weights, capsys):
    assert message in refused(run_linear_eval.main, probe(data, weights, "", *more), capsys)


def test_our_protocol_is_as_it_was(data, weights):
    ours = parse_flags(flags(data, weights, ""))
    assert get_parser_for(ours).get_default("batch_size") == 64
    trainer = run_linear_eval.build(ours)
    assert not any(value.any() for value in trainer.state.model.heads.state_dict().values())
    assert len({*trainer.schedule.lr}) == len(trainer.schedule.lr)  # every step its own
