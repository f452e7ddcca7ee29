"""The comparators compute what ours computes: losses, gradients, codebooks, views; the
report says what was measured.
"""

import copy
import json
import sys
import time

import pytest
import torch
import torch.nn.functional as F
from golden_values import close, fill
from golden_values import mask as random_mask
from refusals import refused

import benchmark
import modeling_finetune
import modeling_pretrain
import modeling_vqkd
from benchmarks import timing
from benchmarks.contests import Workload, data, finetuning, pretraining
from benchmarks.input_images import pretraining_view, write_photos
from benchmarks.plain_models import (
    PlainClassifier,
    PlainPretraining,
    PlainQuantizer,
    PlainViews,
    PlainVQKD,
    read_plainly,
)
from benchmarks.timing import Contender, Contest, Local, Turn, check_agreement, hold, peak_growth
from benchmarks.training_steps import classification_loss, textbook
from datasets import ImageFiles
from norm_ema_quantizer import NormEMAVectorQuantizer
from run_state import Run, RunOptions
from runtime.device import choose_precision
from runtime.distributed import Launch
from runtime.seeding import seeded
from transforms import HALF_MEAN, HALF_STD
from vit_backbone import Variant
from vqkd_teachers import build_teacher

CPU = torch.device("cpu")
BIAS = dict(use_abs_pos_emb=False, init_values=0.1)
SMALL = ["--device", "cpu", "--model", "demo", "--batch_size", "2", "--rounds", "2", "--warmup", "1"]


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(ours: torch.nn.Module, plain: torch.nn.Module) -> None:
    mine, theirs = gradients(ours), gradients(plain)
    assert mine.keys() == theirs.keys()
    for name, gradient in mine.items():
        close(gradient, theirs[name], atol=1e-4 * max(1.0, float(theirs[name].abs().max())))


def test_pretraining():
    ours = fill(
        modeling_pretrain.create_model(
            "beit_demo_patch16_128_8k_vocab_cls_pt", **BIAS, use_shared_rel_pos_bias=True
        ),
        1,
    )
    plain, x, mask = PlainPretraining(ours), torch.rand(2, 3, 128, 128), random_mask(2, 8, 25, 3)
    codes = torch.randint(8192, (50,))
    losses = [sum(F.cross_entropy(logits, codes) for logits in model(x, mask)) for model in (ours, plain)]
    close(losses[0], losses[1], atol=1e-4)
    for loss in losses:
        loss.backward()
    assert_same_gradients(ours, plain.model)


@pytest.mark.parametrize("teacher", ["hog"])
def test_vqkd(teacher):
    built = build_teacher(teacher, grid=8)
    ours = modeling_vqkd.create_model(
        "vqkd_encoder_demo_decoder_1x128x4_hog",
        teacher=built,
        quantize_kmeans_init=False,
    )
    fill(ours, 2).train()
    ours.quantize.embedding.weight.copy_(F.normalize(torch.randn(8192, 32), dim=-1))
    plain, x = PlainVQKD(ours, built).train(), torch.rand(2, 3, 128, 128)
    with torch.no_grad():
        assert torch.equal(ours.get_codebook_indices(x), plain.codes_of(x))
    losses = [ours(x)[0], plain(x)]
    close(losses[0], losses[1], atol=1e-4)
    for loss in losses:
        loss.backward()
    assert_same_gradients(ours, plain.model)
    close(ours.quantize.embedding.weight, plain.quantize.quantizer.embedding.weight, atol=1e-6)
    assert ours.teacher_targets is not None, "the copy took the teacher away"


def test_classifier():
    ours = fill(
        modeling_finetune.create_model("beit_demo_patch16_128", num_classes=7, **BIAS, use_rel_pos_bias=True),
        3,
    )
    plain, x, labels = PlainClassifier(ours), torch.rand(2, 3, 128, 128), torch.tensor([1, 4])
    losses = [F.cross_entropy(model(x), labels) for model in (ours, plain)]
    close(losses[0], losses[1], atol=1e-4)
    for loss in losses:
        loss.backward()
    assert_same_gradients(ours, plain.model)


def test_quantizer_moves_its_codebook_as_the_one_hot_matrix_does():
    ours = NormEMAVectorQuantizer(256, 8).train()
    plain = PlainQuantizer(ours).train()
    for seed in range(3):
        z = torch.randn(2, 8, 5, 5, generator=torch.Generator().manual_seed(seed))
        for mine, theirs in zip(ours(z), plain(z), strict=True):
            close(mine, theirs, atol=1e-6)
    close(ours.embedding.weight, plain.quantizer.embedding.weight, atol=1e-6)
    close(ours.cluster_size, plain.quantizer.cluster_size, atol=1e-6)
    assert not torch.equal(
        ours.embedding.weight, PlainQuantizer(NormEMAVectorQuantizer(256, 8)).quantizer.embedding.weight
    )


def test_views_are_the_same_pixels(tmp_path):
    paths = write_photos(tmp_path, 2)
    files = ImageFiles([(path, None) for path in paths], pretraining_view(64), seed=5)
    views = PlainViews(64, 64, 0.2, 0.4, HALF_MEAN, HALF_STD, pretraining_view(64).mask_generator)
    for index, path in enumerate(paths):
        with seeded(5, 0, index):
            plain = views(read_plainly(path))
        sample = {
            name: value[None] for name, value in files[index].items() if isinstance(value, torch.Tensor)
        }
        ours = files.device_transform(sample)
        assert all(torch.equal(ours[name][0], value) for name, value in plain.items())


def test_the_views_of_a_student_with_other_patches_have_one_grid(monkeypatch):
    """Of 14 pixels, as huge and giant have them; the tokenizer's have 16."""
    name = "beit_demo_patch16_128_8k_vocab_cls_pt"
    monkeypatch.setitem(modeling_pretrain.MODELS, name, Variant(modeling_pretrain.BEiTv2, "demo", 14, 56))
    run = Run(RunOptions(), Launch(), CPU, choose_precision("fp32", CPU))
    for contests in (pretraining, data):
        for contest in contests(Workload("demo", 2), run):
            losses = [contender.turn(contest.batch).loss for contender in contest.contenders]
            assert losses[0] == pytest.approx(losses[1], rel=1e-4)
            if contest.batch:
                sides = [contest.batch[name].shape[-1] for name in ("image", "tokenizer_image")]
                assert sides == [56, 64]


def test_a_contender_that_computes_something_else_is_found_out():
    model = modeling_finetune.create_model("beit_demo_patch16_128", num_classes=7, **BIAS)
    other = copy.deepcopy(model)
    torch.nn.init.normal_(other.head.bias)
    run = Run(RunOptions(), None, CPU, choose_precision("fp32", CPU))
    contenders = [textbook(one, run, classification_loss(one)) for one in (model, other)]
    batch = {"image": torch.rand(2, 3, 128, 128), "label": torch.tensor([1, 4])}
    with pytest.raises(RuntimeError, match="not the same work"):
        hold(Contest("x", contenders, batch, 2, tolerance=1e-4), rounds=1, warmup=1, matmul_flops=1.0)
    check_agreement(Contest("x", contenders, batch, 2, tolerance=None), [1.0, 2.0])
    with pytest.raises(RuntimeError):
        check_agreement(Contest("x", contenders, batch, 2, tolerance=1e-4), [1.0, float("nan")])


def test_ratios_are_of_one_round():
    class Fixed(Contender):
        def __init__(self, name, times, bytes_held):
            self.name, self.times, self.bytes_held = name, iter(times), bytes_held

        def turn(self, batch):
            return Turn(1.0, {"forward": next(self.times), "backward": 1.0})

        def peak(self, batch):
            return self.bytes_held

    # the machine is ten times slower in the second round; the ratio of medians would be
    # 1
    contest = Contest(
        "x", [Fixed("ours", [99, 1, 9, 3], 100), Fixed("plain", [99, 3, 19, 3], 250)], {}, 4, flops=4000
    )
    ours, plain = hold(contest, rounds=3, warmup=1, matmul_flops=4e6)
    assert (plain.ratio, plain.ratio_min, plain.ratio_max) == (2.0, 1.0, 2.0)
    assert (ours.ratio, plain.peak_ratio, ours.ms["step"], ours.ms["backward"]) == (1.0, 2.5, 4.0, 1.0)
    assert ours.images_per_s == 1000 and ours.utilization == pytest.approx(0.25)


def test_peak_is_the_worst_moment_and_not_the_sum(capfd):
    def work():
        first = torch.zeros(1 << 20)  # 4 MiB
        second = first + 1
        del first
        return second + 1

    assert 8 * 2**20 <= peak_growth(CPU, work) < 9 * 2**20
    print("the end", file=sys.stderr)
    assert capfd.readouterr().err == "the end\n"  # nothing of the profiler's, and ours is heard again


def test_phases_add_up():
    def work(batch, mark):
        time.sleep(0.02)
        mark("forward")
        mark("backward")
        return torch.tensor(2.0)

    turn = Local("x", work, CPU).turn({})
    assert turn.loss == 2.0 and turn.ms["forward"] >= 20 and turn.ms["backward"] >= 0


@pytest.mark.slow
@pytest.mark.parametrize("amp_dtype", ["fp32", "bf16"])
def test_the_report(tmp_path, amp_dtype):
    output = tmp_path / "out.json"
    stages, more = ["pretrain", "vqkd", "quantizer", "data", "finetune"], []
    # a few products alone: without a unit for them a CPU takes a hundred times as long
    if amp_dtype == "bf16":
        stages, more = stages[:2], ["--batch_size", "1", "--rounds", "1"]
    benchmark.main([*SMALL, *more, "--stage", *stages, "--amp_dtype", amp_dtype, "--output", str(output)])
    report = json.loads(output.read_text())
    contests = {contest["stage"]: contest for contest in report["contests"]}
    assert list(contests) == stages
    for contest in contests.values():
        assert [row["name"] for row in contest["rows"]][:2] == ["ours", "plain"]
        assert all(
            row["images_per_s"] > 0 and row["ratio_min"] <= row["ratio"] <= row["ratio_max"]
            for row in contest["rows"]
        )
        assert contest["rows"][0]["ratio"] == 1
    for stage in ("pretrain", "vqkd"):
        row = contests[stage]["rows"][0]
        assert row["ms"]["tokenizer"] > 0 and row["ms"]["optimizer"] > 0 and row["utilization"] > 0
        assert contests[stage]["through_loader"]["data"] > 0
    if amp_dtype == "fp32":
        assert (
            contests["quantizer"]["rows"][1]["peak_bytes"]
            > 10 * contests["quantizer"]["rows"][0]["peak_bytes"]
        )
        names = {row["name"] for row in contests["finetune"]["rows"]} | contests["finetune"]["absent"].keys()
        assert names == {"ours", "plain", "timm", "transformers"}
    assert report["machine"]["matmul_tflops"] > 0


@pytest.mark.slow
def test_counted_flops_are_those_of_the_formula():
    """Of the classifier: 3 times the forward's products, less the gradient of the
    image.
    """
    run = Run(RunOptions(), Launch(), CPU, choose_precision("fp32", CPU))
    workload = Workload("demo", batch_size=2)
    contest = next(c for c in finetuning(workload, run) if c.name.endswith("step"))
    b, t, c, depth = 2, 65, 128, 6
    patches = 2 * b * 64 * 768 * c
    block = 2 * b * t * 12 * c * c + 4 * b * t * t * c
    head = 2 * b * c * 1000
    assert contest.flops == 3 * (depth * block + head) + 2 * patches


def test_wrong_flags_are_one_sentence(capsys):
    assert "--rounds" in refused(benchmark.main, [*SMALL, "--rounds", "0"], capsys)
    assert timing.PHASES[0] == "data"
