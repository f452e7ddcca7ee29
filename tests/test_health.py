"""Figures that say without labels whether a network learns: against closed forms, in
runs, killed, resumed and on several processes; and the alarms.
"""

import itertools
import math
import re
import time

import pytest
import torch
from many_processes import one_process, two_processes
from tiny_runs import (
    as_flags,
    assert_same_weights,
    kill_after,
    log_lines,
    photos,
    pretraining_flags,
    vqkd_flags,
)

import modeling_finetune
import run_beitv2_pretraining
import run_vqkd_training
from data_pipeline.files import Files
from datasets import ImageFiles
from monitoring import alarms, health
from monitoring.alarms import Alarms
from norm_ema_quantizer import perplexity

# ── Closed forms ──


@pytest.mark.parametrize("rank", [1, 3, 12])
def test_orthogonal_features_have_their_rank(rank):
    rows = torch.linalg.qr(torch.randn(20, 20, dtype=torch.float64))[0][:rank]
    for features in (rows, rows.repeat(5, 1), 7 * rows.float()):
        assert health.effective_rank(features) == pytest.approx(rank, rel=1e-6)
    assert health.effective_rank(rows.repeat(5, 1)) == pytest.approx(rank, rel=1e-12)


def test_the_rank_is_the_entropy_of_the_singular_values():
    features = torch.zeros(6, 4)
    features[:3, :3] = torch.diag(torch.tensor([2.0, 1.0, 1.0]))  # shares 1/2, 1/4, 1/4
    assert health.effective_rank(features) == pytest.approx(2**1.5)
    assert health.effective_rank(torch.full((9, 5), 3.0)) == pytest.approx(1)  # all images alike
    assert math.isnan(health.effective_rank(torch.zeros(9, 5)))
    assert math.isnan(health.effective_rank(torch.tensor([[1.0, math.nan]])))


def test_dead_channels_move_less_than_a_hundredth():
    images = torch.randn(500, 8, dtype=torch.float64)
    images = (images - images.mean(0)) / images.std(0, correction=0)
    assert health.dead_feature_share(images) == 0
    images[:, 0], images[:, 1] = 5.0, images[:, 1] * 0.0074  # of 6.0074 / 8
    assert health.dead_feature_share(images) == 2 / 8
    images[:, 1] *= 0.0076 / 0.0074
    assert health.dead_feature_share(images) == 1 / 8
    assert health.dead_feature_share(torch.ones(5, 3)) == 1


GRID, PATCH = (2, 3), (16, 16)


def with_cls(among_patches):
    """Weights (T, T) of which half go to CLS, and what CLS attends to."""
    weights = torch.full((7, 7), 1 / 7)
    weights[1:, 0], weights[1:, 1:] = 0.5, 0.5 * among_patches
    return weights.expand(2, 3, 7, 7)


def test_attention_distance_has_closed_forms():
    distances = health.patch_distances(GRID, PATCH)
    places = list(itertools.product(range(2), range(3)))
    mean = sum(math.dist(a, b) for a in places for b in places) / 36
    assert health.attention_distance(with_cls(torch.full((6, 6), 1 / 6)), distances) == pytest.approx(
        16 * mean
    )
    assert health.attention_distance(with_cls(torch.eye(6)), distances) == 0
    mirrored = torch.eye(6)[[2, 1, 0, 5, 4, 3]]  # two columns away, or at the place itself
    assert health.attention_distance(with_cls(mirrored), distances) == pytest.approx(16 * 4 / 3)
    wide = health.patch_distances(GRID, (8, 32))
    assert health.attention_distance(with_cls(mirrored), wide) == pytest.approx(32 * 4 / 3)


@torch.no_grad()
def test_distances_of_a_model_are_those_of_its_attention_maps(monkeypatch):
    torch.manual_seed(3)
    model = modeling_finetune.create_model("beit_demo_patch16_128", img_size=48, use_rel_pos_bias=True).eval()
    for block in model.blocks:
        torch.nn.init.normal_(block.attn.relative_position_bias_table)
    images, distances = torch.randn(5, 3, 48, 48), health.patch_distances((3, 3), PATCH)
    expected = [
        health.attention_distance(model.attention_maps(images, layer), distances) for layer in range(6)
    ]
    assert health.attention_distances(model, images) == pytest.approx(expected)
    assert max(expected) - min(expected) > 1
    monkeypatch.setattr(health, "ATTENTION_NUMBERS", 2 * 4 * 10**2)  # two images at a time
    assert health.attention_distances(model, images) == pytest.approx(expected)


def test_perplexity_and_margin_of_known_distributions():
    assert perplexity(torch.tensor([5.0] * 8 + [0.0] * 8)) == pytest.approx(8)
    assert perplexity(torch.tensor([2.0, 1.0, 1.0])) == pytest.approx(2**1.5)
    seen = health.Seen({}, torch.tensor([6, 2, 2, 0]), torch.tensor([0, 0, 0, 10]), correct=7)
    figures = health.prediction_figures(seen)
    assert figures["health_mlm_margin"] == pytest.approx(10)  # 70% against 60%
    assert figures["health_perplexity_predicted"] == pytest.approx(1)
    assert figures["health_perplexity_target"] == pytest.approx(
        math.exp(0.6 * math.log(1 / 0.6) + 0.4 * math.log(5))
    )


# ── Runs ──

EVERY = as_flags(health_freq=1)
OF_PREDICTIONS = {"health_mlm_margin", "health_perplexity_target", "health_perplexity_predicted"}
OF_STUDENT = {"health_rank_cls", "health_rank_mean", "health_dead_features"}
OF_STUDENT |= {f"health_attention_distance_block_{block}" for block in range(1, 7)}


def health_of(line):
    return {name: value for name, value in line.items() if name.startswith("health_")}


def run_stage(name, data, codes, out, *more):
    if name == "vqkd":
        run_vqkd_training.main(vqkd_flags(data, out, *more))
    else:
        run_beitv2_pretraining.main(pretraining_flags(data, out, codes, "--drop_path", "0.1", *more))
    return log_lines(out)


stages = pytest.mark.parametrize("name", ["pretrain", "vqkd"])


@pytest.mark.slow
@stages
def test_health_leaves_training_alone_bit_for_bit(name, data, tokenizer_weight, tmp_path):
    held_out = photos(tmp_path / "held_out", per_class=3)
    more = as_flags(epochs=4, eval_data_path=held_out, eval_freq=3)
    plain = run_stage(name, data, tokenizer_weight, tmp_path / "without", *more, *as_flags(health_freq=0))
    lines = run_stage(name, data, tokenizer_weight, tmp_path / "with", *more, *as_flags(health_freq=2))
    assert_same_weights(tmp_path / "without/checkpoint.pth", tmp_path / "with/checkpoint.pth")
    assert [line["train_loss"] for line in plain] == [line["train_loss"] for line in lines]
    assert [bool(health_of(line)) for line in lines] == [False, True, False, True]
    assert not any(map(health_of, plain))
    figures = health_of(lines[-1])
    if name == "pretrain":
        assert figures.keys() == OF_PREDICTIONS | OF_STUDENT
        # the accuracy is that of the evaluation, on the same images, crops and masks
        margin = 100 * lines[-1]["test_mlm_acc_1"] - figures["health_mlm_margin"]
        patches = 6 * 2  # of six images
        assert margin * patches / 100 == pytest.approx(round(margin * patches / 100))
        assert 1 <= figures["health_rank_cls"] <= 6
    else:
        assert figures["health_codes_used"] == lines[-1]["test_codes_used"]
        assert 1 <= figures["health_perplexity"] <= figures["health_codes_used"]
    assert all(map(math.isfinite, figures.values()))


@pytest.mark.slow
@stages
def test_health_of_a_killed_run_is_that_of_an_undisturbed_one(
    name, data, tokenizer_weight, tmp_path, monkeypatch
):
    more = [*EVERY, *as_flags(epochs=3, save_ckpt_steps=2)]
    whole = run_stage(name, data, tokenizer_weight, tmp_path / "whole", *more)
    kill_after(6, monkeypatch)  # of 4 an epoch
    with pytest.raises(KeyboardInterrupt):
        run_stage(name, data, tokenizer_weight, tmp_path / "broken", *more)
    monkeypatch.undo()
    broken = run_stage(name, data, tokenizer_weight, tmp_path / "broken", *more)
    assert list(map(health_of, whole)) == list(map(health_of, broken))
    assert [line.get("alarms") for line in whole] == [line.get("alarms") for line in broken]
    assert_same_weights(tmp_path / "whole/checkpoint.pth", tmp_path / "broken/checkpoint.pth")


@pytest.mark.slow
def test_two_processes_see_what_one_sees(data, tokenizer_weight, tmp_path):
    """Nine images, so that one of them has a batch more."""
    held_out = photos(tmp_path / "held_out", per_class=9, classes="a")
    more = [*EVERY, *as_flags(eval_data_path=held_out, drop_path=0)]
    for out, batch, run in (("one", 4, one_process), ("two", 2, two_processes)):
        flags = pretraining_flags(data, tmp_path / out, tokenizer_weight, *more, *as_flags(batch_size=batch))
        run("run_beitv2_pretraining.py", flags)
    for one, two in zip(log_lines(tmp_path / "one"), log_lines(tmp_path / "two"), strict=True):
        assert health_of(one) == pytest.approx(health_of(two), rel=1e-4)
        assert one.keys() >= OF_STUDENT


def test_without_codes_there_are_the_other_figures(data, tokenizer_weight, tmp_path):
    lines = run_stage(
        "pretrain", data, tokenizer_weight, tmp_path, *EVERY, "--target", "pixels", "--epochs", "1"
    )
    assert health_of(lines[0]).keys() == OF_STUDENT


def test_with_nothing_masked_all_patches_are_predicted(data, tokenizer_weight, tmp_path):
    more = [*EVERY, *as_flags(no_mask=True, eval_data_path=data, epochs=1)]
    flags = pretraining_flags(data, tmp_path, tokenizer_weight, *more)
    number = flags.index("--num_mask_patches")
    run_beitv2_pretraining.main(flags[:number] + flags[number + 2 :])
    line = log_lines(tmp_path)[0]
    share = 100 * line["test_all_acc_1"] - line["health_mlm_margin"]
    assert share * 64 / 100 == pytest.approx(round(share * 64 / 100))  # 16 images of 4 patches
    assert 100 / 16 <= share <= 100


def test_no_figure_is_of_a_quantizer_that_warms_up(data, tmp_path):
    flags = vqkd_flags(data, tmp_path, *EVERY, *as_flags(quantizer_warmup_steps=5, epochs=6))
    run_vqkd_training.main(flags)
    lines = log_lines(tmp_path)
    assert "health_perplexity" not in lines[0] and "health_perplexity" in lines[-1]
    assert all("health_rank_mean" in line for line in lines)


class Images(Files):
    def __init__(self, count):
        self.count, self.view = count, None

    def __len__(self):
        return self.count


@pytest.mark.parametrize(
    ("asked", "held_out", "training", "epochs", "every", "nth"),
    [
        (None, 50_000, 1_281_167, 300, 1, 25),  # ImageNet
        (None, 524, 2100, 20, 10, 1),  # the demo
        (None, None, 2100, 20, 19, 2),
        (None, None, 16, 2, None, None),  # nothing is cheap enough
        (1, None, 16, 2, 1, 1),
        (3, 2001, 4000, 3, 3, 2),
        (0, 500, 4000, 3, None, None),
    ],
)
def test_by_default_figures_take_less_than_2_percent(asked, held_out, training, epochs, every, nth):
    looked_at = []

    def loader(dataset, every):
        looked_at.append((len(dataset), every))

    images = None if held_out is None else Images(held_out)
    probe = health.build_probe(asked, images, Images(training), epochs, loader)
    assert (probe and probe.every) == every
    if probe:
        assert looked_at == [(held_out or training, nth)]
        assert [probe.is_due(epoch) for epoch in range(2 * every)].count(True) == 2


def test_what_is_looked_at_is_said_once(data, tokenizer_weight, tmp_path, capsys):
    run_stage("pretrain", data, tokenizer_weight, tmp_path / "a", *EVERY)
    said = capsys.readouterr().out
    assert said.count("health     every 1 epoch, on 16 training images, each with one fixed crop, as no") == 1
    run_stage("vqkd", data, "", tmp_path / "b", *as_flags(eval_data_path=data, epochs=1))
    said = capsys.readouterr().out
    assert "health     not measured, which would take over 2% of so short a run (--health_freq)" in said


# ── Alarms ──


def told(caplog):
    messages = [text.removeprefix("alarm: ") for text in caplog.messages if text.startswith("alarm: ")]
    caplog.clear()
    return messages


def test_an_alarm_is_told_once_and_again_when_it_came_back(caplog):
    found = Alarms()
    for sentence, says in [("a", 1), ("b", 0), (None, 0), ("c", 1), ("d", 0)]:
        found.tell({"kind": sentence, "other": None})
        assert len(told(caplog)) == says
    found.tell({})  # which shows nothing of it
    assert found.after_epoch({}, {"kind": "e"}) == ["kind"]
    resumed = Alarms([{"epoch": 0, "alarms": ["kind"]}])
    resumed.tell({"kind": "f"})
    assert told(caplog) == []
    assert resumed.after_epoch({}, {"kind": None}) == []
    resumed.tell({"kind": "g"})
    assert told(caplog) == ["g"]


def test_two_reports_of_ten_times_the_median_are_an_explosion(caplog):
    found = Alarms()
    for norm in [*[1.0, 1.2, 0.8] * 5, 50.0, 1.0, math.nan, 11.9, 1.0]:
        found.after_report(norm)
    assert told(caplog) == []
    found.after_report(10.1)
    found.after_report(12.0)
    assert told(caplog)[0].startswith(
        "the gradient norm is 12, 12 times what it usually was in this run (1): lower"
    )
    assert found.after_epoch({}, {}) == ["gradient"]
    assert found.after_epoch({}, {}) == []
    resumed = Alarms([], [{"grad_norm": 1.0}] * 12)
    resumed.after_report(11)
    resumed.after_report(11)
    assert len(told(caplog)) == 1


@pytest.mark.parametrize(
    ("found", "kind", "says"),
    [
        (alarms.skipped_steps(0, 9), "skipped_steps", ""),
        (alarms.skipped_steps(2, 9), "skipped_steps", "2 of this epoch's 9 steps changed nothing"),
        (alarms.target_codes(256, 180.0, 256), "target_codes", ""),
        (alarms.target_codes(256, 17.0, 256), "target_codes", r"perplexity of 17 \(256 of 256"),
        (alarms.target_codes(30, 20.0, 8192), "target_codes", r"perplexity of 20 \(30 of 8192"),
        (alarms.predicted_codes(40.0, 180.0), "predicted_codes", ""),
        (alarms.predicted_codes(1.2, 180.0), "predicted_codes", "have a perplexity of 1.2, the targets 180"),
        (alarms.flat_loss({"loss_1": 5.1, "loss_2": 5.0}, 187.0, 256), "flat_loss", ""),
        (alarms.flat_loss({"loss_1": 5.2, "loss_2": 5.1}, 187.0, 256), "flat_loss", r"\(loss_1 5.2; .* 5.23"),
        (alarms.flat_loss({"loss": 5.5}, 256.0, 256), "flat_loss", r"\(loss 5.5; .* 5.55, ln 256"),
        (alarms.codebook_use(256, 180.0, 256, True), "uneven_codes", ""),
        (alarms.codebook_use(256, 17.0, 256, True), "uneven_codes", "unevenly that 17 used equally"),
        (alarms.codebook_use(100, 90.0, 256, False), "few_codes", "only 100 of 256 .*`revive_dead_codes`"),
        (alarms.data_wait(20, 100, 2, 8, True), "data_wait", ""),
        (alarms.data_wait(4, 8, 2, 8, True), "data_wait", ""),  # seconds, not worth a word
        (alarms.data_wait(50, 100, 2, 8, False), "data_wait", r": give `num_workers` 4 \(2 more than now\)$"),
        (alarms.data_wait(60, 100, 0, 8, True), "data_wait", "`num_workers` 2 .*, or `data_pipeline` fast$"),
        (alarms.data_wait(90, 100, 2, 8, True), "data_wait", "2 data processes .* 8 cores: shrink"),
    ],
)  # fmt: skip
def test_a_sentence_for_each_kind(found, kind, says):
    assert bool(found[kind]) == bool(says)
    assert re.search(says, found[kind] or "")
    for text in filter(None, found.values()):
        assert ": " in text and ". " not in text  # one sentence, with what to do


def test_few_codes_and_uneven_ones_are_told_apart():
    """Else a codebook that is both would tell the one again when the other goes."""
    assert None not in alarms.codebook_use(34, 5.6, 256, True).values()
    assert alarms.codebook_use(256, 180.0, 256, True) == {"few_codes": None, "uneven_codes": None}


def test_a_rank_is_compared_with_its_best():
    earlier = [{"health_rank_mean": 10.0}, {}, {"health_rank_mean": 40.0}, {"health_rank_mean": math.nan}]

    def found(rank):
        return alarms.falling_rank("health_rank_mean", {"health_rank_mean": rank}, earlier)

    assert found(20.0) == {"rank_mean": None}
    assert "fell to 19.9, less than half of its best (40.0)" in found(19.9)["rank_mean"]
    assert alarms.falling_rank("health_rank_mean", {}, earlier) == {}


def test_waiting_for_a_slow_loader_alarms_and_is_in_log_txt(
    data, tokenizer_weight, tmp_path, monkeypatch, capsys
):
    opened = ImageFiles.open
    monkeypatch.setattr(ImageFiles, "open", lambda self, index: time.sleep(0.3) or opened(self, index))
    monkeypatch.setattr(alarms, "LEAST_WAIT", 0.5)
    lines = run_stage("pretrain", data, tokenizer_weight, tmp_path)
    said = capsys.readouterr().out
    assert said.count("of this epoch went into waiting for images: ") == 1
    assert all("data_wait" in line["alarms"] for line in lines)


def test_one_code_for_all_patches_alarms(data, tokenizer_weight, tmp_path, capsys):
    """A tokenizer whose codes are nearly all the same one."""
    content = torch.load(tokenizer_weight, weights_only=True)
    weight = content["model"]["encode_task_layer.2.weight"]
    weight.zero_()
    torch.save(content, tmp_path / "collapsed.pth")
    more = as_flags(warmup_epochs=0, lr=0, min_lr=0)
    lines = run_stage("pretrain", data, tmp_path / "collapsed.pth", tmp_path / "out", *EVERY, *more)
    assert lines[0]["train_target_codes"] == 1
    assert "target_codes" in lines[-1]["alarms"]


def test_guessing_after_the_warm_up_alarms(data, tokenizer_weight, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(alarms, "LEAST_WARM_UP", 1)
    more = as_flags(lr=1e-9, min_lr=1e-9, epochs=3, drop_path=0)
    lines = run_stage("pretrain", data, tokenizer_weight, tmp_path, *more)
    assert [("flat_loss" in line.get("alarms", ())) for line in lines] == [False, True, True]
    assert capsys.readouterr().out.count("the loss is that of guessing") == 1
