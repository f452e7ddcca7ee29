"""k-NN on frozen features: against a plain computation, over ranks, and while a model
pretrains.
"""

import json
import re

import numpy as np
import pytest
import timm
import torch
from many_processes import run_ranks
from tiny_runs import as_flags, assert_same_weights, log_lines, photos, pretraining_flags, student, tokenizer

import run_beitv2_pretraining
import run_linear_eval
from evaluation import knn
from flags.linear_eval import TRAINING_FLAGS

CPU = torch.device("cpu")
CLASSES = 7


def some_features(n, seed, dim=12):
    """Noisy class centers, one channel much larger than the others."""
    generator = torch.Generator().manual_seed(seed)
    centers = torch.randn(CLASSES, dim, generator=torch.Generator().manual_seed(99))
    labels = torch.randint(CLASSES, (n,), generator=generator)
    values = centers[labels] + 1.2 * torch.randn(n, dim, generator=generator)
    values[:, 0] *= 8
    return knn.Features(values, labels, torch.arange(n))


def by_hand(train, queries, k, temperature, standardize):
    """The definition, in double precision, one query at a time; (top-1, top-5) in
    percent.
    """
    bank, asked = train.values.double().numpy(), queries.values.double().numpy()
    if standardize:
        mean, std = bank.mean(0), bank.std(0)
        bank, asked = (bank - mean) / std, (asked - mean) / std
    bank = bank / np.linalg.norm(bank, axis=1, keepdims=True)
    hits = np.zeros(2)
    for query, label in zip(asked, queries.labels.tolist(), strict=True):
        similar = bank @ (query / np.linalg.norm(query))
        votes = np.zeros(CLASSES)
        for neighbor in np.argsort(-similar)[:k]:
            votes[train.labels[neighbor]] += np.exp(similar[neighbor] / temperature)
        ranked = [c for c in np.argsort(-votes, kind="stable") if votes[c] > 0]
        hits += label in ranked[:1], label in ranked[:5]
    return 100 * hits / len(asked)


@pytest.mark.parametrize("standardize", [False, True])
@pytest.mark.parametrize("temperature", [0.07, 1.0])
def test_accuracies_are_those_of_the_definition(standardize, temperature, monkeypatch):
    train, queries = some_features(150, 1), some_features(61, 2)
    ks = (1, 10, 20, 1000)  # the last one is cut to the 150 there are
    monkeypatch.setattr(knn, "SIMILARITIES", 150 * 8)  # 8 queries at a time
    found = knn.knn_accuracies(train, queries, CLASSES, CPU, ks, temperature, standardize)
    for k in ks:
        expected = by_hand(train, queries, k, temperature, standardize)
        assert [found[f"knn{k}_acc{top}"] for top in (1, 5)] == pytest.approx(expected)
    assert found["knn_images"] == 61
    assert found["knn1_acc5"] == found["knn1_acc1"]  # one neighbor votes for one class
    assert 20 < found["knn10_acc1"] < 95


def test_equal_votes_go_to_the_lower_class_and_no_votes_are_last():
    votes = torch.tensor([[0.0, 2.0, 2.0, 5.0]]).repeat(4, 1)
    assert knn.rank_labels(votes, torch.arange(4)).tolist() == [9, 1, 2, 0]


def test_standardized_channels_have_no_scale():
    train, queries = some_features(150, 1), some_features(61, 2)
    scale = torch.logspace(-2, 2, 12)
    scaled = [knn.Features(f.values * scale, f.labels, f.index) for f in (train, queries)]
    assert knn.knn_accuracies(*scaled, CLASSES, CPU, standardize=True) == knn.knn_accuracies(
        train, queries, CLASSES, CPU, standardize=True
    )
    assert knn.knn_accuracies(*scaled, CLASSES, CPU) != knn.knn_accuracies(train, queries, CLASSES, CPU)


def test_pooling():
    tokens = torch.randn(2, 5, 3)
    assert torch.equal(knn.pool(tokens, "cls"), tokens[:, 0])
    assert torch.equal(knn.pool(tokens, "mean"), tokens[:, 1:].mean(1))
    assert torch.equal(knn.pool(tokens, "cls_mean"), torch.cat((tokens[:, 0], tokens[:, 1:].mean(1)), 1))


def share(features, rank, world_size):
    """As the evaluation's sampler deals them out, computed in batches of 4."""
    own = range(rank, len(features), world_size)
    chunks = [list(own[start : start + 4]) for start in range(0, len(own), 4)]
    columns = {"image": features.values, "label": features.labels, "index": features.index}
    return knn.extract(
        ({name: column[chunk] for name, column in columns.items()} for chunk in chunks), lambda x: x
    )


def on_rank(rank, world_size):
    train, queries, single = some_features(35, 1), some_features(9, 2), some_features(1, 3)
    whole = knn.gather_features(share(train, rank, world_size), CPU, rows=5)
    same = torch.equal(whole.values, train.values) and torch.equal(whole.labels, train.labels)
    tiny = knn.gather_features(share(single, rank, world_size), CPU)  # rank 1 has nothing
    same = same and torch.equal(tiny.values, single.values)
    results = [
        knn.knn_accuracies(whole, share(f, rank, world_size), CLASSES, CPU, (10, 20))
        for f in (queries, single)
    ]
    return {"same": same, "results": results}


@pytest.mark.slow
def test_two_processes_find_what_one_finds():
    alone = on_rank(0, 1)
    assert alone["same"]
    for of_rank in run_ranks(on_rank, 2):
        assert of_rank == alone
    assert alone["results"][0]["knn_images"] == 9


def test_the_script_finds_every_image_nearest_to_itself(tmp_path, capsys):
    data, weights = photos(tmp_path / "data", per_class=5, classes="abc"), student(tmp_path / "student.pth")
    flags = ["--knn", "--finetune", str(weights), "--data_set", "image_folder", "--data_path", str(data)]
    flags += [
        *as_flags(eval_data_path=data, output_dir=tmp_path / "out", device="cpu", num_workers=0),
    ]
    run_linear_eval.main(
        [*flags, "--knn_k", "1", "30", "--amp_dtype", "fp32", "--batch_size", "4", "--knn_layer", "2"]
    )
    results = json.loads((tmp_path / "out/knn.json").read_text())
    assert (results["knn1_acc1"], results["knn_images"]) == (100, 15)
    assert results["knn30_acc5"] == 100  # all 15 vote, and there are three classes
    out = capsys.readouterr().out
    assert "features   cls of layer 2" in out
    assert "k is cut" in out


def test_flags_of_training_are_named_with_k_nn(tmp_path, capsys):
    data, weights = photos(tmp_path / "data", per_class=2), student(tmp_path / "student.pth")
    flags = [
        *as_flags(finetune=weights, data_set="image_folder", data_path=data, device="cpu"),
    ]
    held_out = str(photos(tmp_path / "held_out", per_class=2))
    flags += ["--eval_data_path", held_out, "--num_workers", "0", "--amp_dtype", "fp32", "--batch_size", "2"]
    run_linear_eval.main([*flags, "--knn"])
    assert "warning" not in capsys.readouterr().out.replace("k is cut", "")
    run_linear_eval.main(
        [*flags, "--knn", "--epochs", "3", "--lr", "5", "--opt", "sgd", "--save_ckpt_freq", "1"]
    )
    assert (
        "warning: --epochs, --lr, --opt, --save_ckpt_freq do nothing here: --knn trains nothing"
        in capsys.readouterr().out
    )
    run_linear_eval.main([*flags, "--epochs", "1", "--lr", "5"])
    assert "nothing here" not in capsys.readouterr().out


def test_every_flag_of_the_optimizer_is_idle_or_read_with_k_nn():
    """A new flag of the optimizer or of the checkpoints is put into one of the two."""
    groups = {group.title: group for group in run_linear_eval.get_parser()._action_groups}
    read = {"batch_size", "amp_dtype", "warmup_lr"}  # warmup_lr is warned of everywhere
    read |= {"output_dir", "device", "seed", "num_workers", "pin_mem"}
    read |= {"auto_resume"}  # without a checkpoint there is nothing to go on from, whatever it says
    found = {action.dest for title in ("optimization", "run") for action in groups[title]._group_actions}
    published = {"base_lr"}  # in the group of the published protocol
    assert found | published == {*TRAINING_FLAGS} | read


@pytest.fixture(scope="module")
def split(tmp_path_factory):
    folder = tmp_path_factory.mktemp("labeled")
    photos(folder / "train", per_class=6)
    photos(folder / "val", per_class=5)
    return folder


@pytest.mark.slow
def test_knn_has_its_own_frequency_and_leaves_training_alone(split, tmp_path):
    codes = tokenizer(tmp_path / "tokenizer.pth")
    more = ["--epochs", "4", "--drop_path", "0.1", "--eval_data_path", str(split / "val"), "--eval_freq", "3"]
    run_beitv2_pretraining.main(pretraining_flags(split / "train", tmp_path / "without", codes, *more))
    more += ["--knn_freq", "2", "--knn_data_path", str(split)]
    run_beitv2_pretraining.main(pretraining_flags(split / "train", tmp_path / "with", codes, *more))
    assert_same_weights(tmp_path / "without/checkpoint.pth", tmp_path / "with/checkpoint.pth")
    lines = log_lines(tmp_path / "with")
    assert ["test_knn_acc1" in line for line in lines] == [False, True, False, True]
    assert ["test_loss" in line for line in lines] == [False, False, True, True]
    assert all(
        0 <= line[name] <= 100 for line in lines[1::2] for name in ("test_knn_acc1", "test_knn10_acc1")
    )
    # The same figure as of the finished checkpoint.
    flags = [
        *as_flags(knn=True, finetune=tmp_path / "with/checkpoint.pth", data_set="IMNET", data_path=split),
    ]
    flags += [
        *as_flags(device="cpu", num_workers=0, amp_dtype="fp32", output_dir=tmp_path / "knn"),
    ]
    run_linear_eval.main([*flags, "--knn_k", "10", "20", "--batch_size", "4"])
    results = json.loads((tmp_path / "knn/knn.json").read_text())
    assert lines[-1]["test_knn_acc1"] == results["knn20_acc1"]
    assert lines[-1]["test_knn10_acc1"] == results["knn10_acc1"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--knn_freq", "2"], "--knn_freq .* and --knn_data_path .* act together"),
        (["--knn_data_path", "/x"], "--knn_freq .* and --knn_data_path .* act together"),
        (
            ["--knn_freq", "1", "--knn_data_path", "/nowhere"],
            "--knn_data_path /nowhere: a folder that holds train/ and val/",
        ),
        (["--knn_temperature", "0"], "knn_temperature: .0. is not a number above 0"),
    ],
)
def test_what_cannot_be_evaluated_is_refused(flags, message, split, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        run_beitv2_pretraining.main(
            pretraining_flags(split / "train", tmp_path, tokenizer(tmp_path / "t.pth"), *flags)
        )
    assert stop.value.code == 2
    assert re.search(message, capsys.readouterr().err)


def test_backbones_are_compared_in_one_table(data, tmp_path, capsys):
    """A pretrained file of ours, and a ViT of timm with its own size and normalization,
    on the same images.
    """
    ours = student(tmp_path / "pt.pth")
    args = dict(img_size=32, embed_dim=32, depth=2, num_heads=2)
    model = timm.create_model("vit_tiny_patch16_224", **args)
    timm.models.save_for_hf(model, tmp_path / "timm", model_args=args)
    theirs = f"timm:local-dir:{tmp_path / 'timm'}"
    where = as_flags(data_path=data, eval_data_path=data, data_set="image_folder", device="cpu")
    flags = ["--knn", *where, *as_flags(num_workers=0, amp_dtype="fp32"), "--knn_k", "1", "3"]
    run_linear_eval.main([*flags, *as_flags(finetune=theirs, output_dir=tmp_path / "alone")])
    gone = str(tmp_path / "gone.pth")
    compared = ["--compare", gone, theirs, *as_flags(finetune=ours, output_dir=tmp_path / "both")]
    with pytest.raises(SystemExit):  # after all others, whose figures are kept
        run_linear_eval.main([*flags, *compared])
    alone, both = (json.loads((tmp_path / run / "knn.json").read_text()) for run in ("alone", "both"))
    assert both["compared"][theirs] == alone
    assert both["compared"][str(ours)]["knn1_acc1"] == both["knn1_acc1"]
    out, error = capsys.readouterr()
    assert error == f"error: --compare {gone}: not in the table; the lines above say why\n"
    assert next(line for line in out.splitlines() if line.startswith("left out   ") and gone in line)
    row = next(line for line in out.splitlines() if line.startswith(theirs))
    assert row.split()[1:] == [f"{alone[f'knn{k}_acc1']:.2f}" for k in (1, 3)]
