"""The EMA quantizer: golden numbers, what it must not write, k-means, revival, and two
processes with one codebook.
"""

import types

import pytest
import torch
from golden_values import arrays, close
from many_processes import run_ranks
from numpy.random import RandomState

from engine_for_vqkd import TokenizerStage
from layers.codebook_search import nearest_codes
from monitoring.alarms import Alarms
from norm_ema_quantizer import NormEMAVectorQuantizer, cosine_kmeans, l2_normalize

SEED = 200


def normal(seed, *shape):
    return torch.from_numpy(RandomState(seed).standard_normal(shape)).float()


def golden_quantizer():
    quantizer = NormEMAVectorQuantizer(32, 8, beta=1.0, decay=0.99)
    quantizer.embedding.weight.copy_(l2_normalize(normal(SEED, 32, 8)))
    return quantizer.train()


def test_three_steps_and_an_evaluation():
    golden, quantizer = arrays("quantizer"), golden_quantizer()
    for step in range(3):
        z = normal(SEED + 1 + step, 2, 8, 4, 4).requires_grad_()
        z_q, loss, indices = quantizer(z)
        (z_q.pow(2).sum() + loss).backward()
        close(z_q.detach(), golden[f"zq{step}"])
        close(z.grad, golden[f"grad{step}"])
        assert float(loss.detach()) == pytest.approx(float(golden[f"loss{step}"]), rel=1e-4)
        assert torch.equal(indices, golden[f"idx{step}"].long())
        close(quantizer.embedding.weight, golden[f"weight{step}"], atol=1e-6)
        close(quantizer.cluster_size, golden[f"cluster{step}"], atol=1e-6)
    before = {key: value.clone() for key, value in quantizer.state_dict().items()}
    z_q, _, indices = quantizer.eval()(normal(SEED + 9, 2, 8, 4, 4))
    close(z_q, golden["zq_eval"])
    assert torch.equal(indices, golden["idx_eval"].long())
    after = quantizer.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before), "evaluation must not write"


def test_lookup_is_fp32_under_autocast():
    quantizer, z = golden_quantizer().eval(), normal(3, 4, 8, 8, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z_q, loss, indices = quantizer(z)
    assert z_q.dtype == loss.dtype == torch.float32
    assert torch.equal(indices, quantizer(z)[2])


def test_a_batch_that_is_not_finite_leaves_the_codebook_alone():
    quantizer = golden_quantizer()
    before = quantizer.embedding.weight.clone()
    z = normal(5, 2, 8, 4, 4)
    z[0, 0, 0, 0] = float("nan")
    quantizer(z)
    assert torch.equal(before, quantizer.embedding.weight)
    assert float(quantizer.cluster_size.sum()) == 0


def near_ties(n_codes):
    """256 directions; the codes are copies of them in all blocks, equal or 2^-10 apart
    in an entry.
    """
    codes = l2_normalize(normal(1, 256, 32)).repeat(n_codes // 256, 1)
    entries = RandomState(2).randint(0, 2, n_codes)
    codes[range(n_codes), entries] += torch.from_numpy(RandomState(3).randint(-1, 2, n_codes)).float() / 1024
    return l2_normalize(normal(4, 1000, 32)), codes


def test_the_first_of_equally_near_codes_is_taken_in_any_chunk():
    """Entries are multiples of 2^-10, so that all sums are exact in fp32 and ties are
    ties.
    """
    features, codes = ((1024 * x).round() / 1024 for x in near_ties(1024))
    features[27], features[40, 5], features[-1] = 0, float("nan"), float("nan")
    similarity = features @ codes.t()
    assert ((similarity == similarity.amax(dim=1, keepdim=True)).sum(dim=1) > 1).sum() > 250
    assert torch.equal(nearest_codes(features, codes), similarity.argmax(dim=1))


def test_kmeans_with_fewer_features_than_codes_has_no_duplicates():
    features = l2_normalize(normal(1, 20, 8))
    codes = cosine_kmeans(torch.cat((features, features)), 64)
    assert codes.shape == (64, 8)
    assert len(torch.unique(codes, dim=0)) == 64
    assert (features @ codes.t()).amax(dim=1).min() > 0.9999  # every distinct feature is a code


def test_kmeans_finds_the_clusters():
    centers = torch.eye(8)
    features = l2_normalize(centers.repeat_interleave(50, dim=0) + 0.05 * normal(2, 400, 8))
    found = cosine_kmeans(features, 8)
    assert (centers @ found.t()).amax(dim=1).min() > 0.7  # all near a center ...
    assert (features @ found.t()).amax(dim=1).mean() > 0.9  # ... and few clusters merged


def test_warm_up_passes_features_and_then_collects_for_kmeans():
    quantizer = NormEMAVectorQuantizer(16, 8, kmeans_init=True).train()
    quantizer.warming_up, quantizer.gather_for_kmeans = True, 48
    z = normal(1, 2, 8, 4, 4)  # 32 features
    z_q, loss, indices = quantizer(z)
    close(z_q, torch.nn.functional.normalize(z, dim=1))
    assert float(loss) == 0 and (indices == -1).all() and not quantizer.ready
    quantizer.warming_up = False
    quantizer(z)  # 32 of 48 collected: still unquantized
    assert not quantizer.ready
    _, _, indices = quantizer(normal(2, 2, 8, 4, 4))
    assert quantizer.ready and bool(quantizer.embedding.initted) and (indices >= 0).all()


def test_codes_unused_for_an_epoch_are_revived():
    quantizer = NormEMAVectorQuantizer(64, 8).train()
    crowded = l2_normalize(torch.ones(1, 8, 1, 1) + 0.3 * normal(1, 4, 8, 8, 8))
    quantizer.start_epoch(revive_dead_codes=True)
    quantizer(crowded)
    first = quantizer.usage()["codes_used"]
    for _ in range(3):
        quantizer.start_epoch(revive_dead_codes=True)
        quantizer(crowded)
    assert first < 20
    assert quantizer.usage()["codes_used"] > 50
    assert quantizer.usage()["perplexity"] > 20


def test_a_loaded_codebook_is_not_initialized_again():
    trained, fresh = golden_quantizer(), NormEMAVectorQuantizer(32, 8, kmeans_init=True)
    assert not fresh.ready
    fresh.load_state_dict(trained.state_dict())
    assert fresh.ready
    with torch.no_grad():
        fresh.eval()(normal(1, 2, 8, 4, 4))
    assert torch.equal(fresh.embedding.weight, trained.embedding.weight)


def _train_on_a_share(rank, world_size, kmeans):
    """Each rank takes its share of the same features; with one process, all of them."""
    torch.manual_seed(rank)  # ranks that draw differently must agree all the same
    quantizer = NormEMAVectorQuantizer(16, 8, kmeans_init=kmeans).train()
    if not kmeans:
        quantizer.embedding.weight.copy_(l2_normalize(normal(9, 16, 8)))
    for step in range(3):
        quantizer.start_epoch(revive_dead_codes=True)
        quantizer(normal(step, 4, 8, 4, 4).chunk(world_size)[rank])
    return {key: value.clone() for key, value in quantizer.state_dict().items()}


@pytest.mark.slow
@pytest.mark.parametrize("kmeans", [False, True])
def test_two_processes_keep_the_codebook_of_one_process(kmeans):
    first, second = run_ranks(_train_on_a_share, 2, kmeans)
    alone = _train_on_a_share(0, 1, kmeans)
    # the start weights, which here differ by rank on purpose
    for key in first.keys() - {"embedding.embed_avg"}:
        assert torch.equal(first[key], second[key]), key
        close(first[key], alone[key], atol=1e-5)


@pytest.mark.parametrize(
    ("counts", "warns"),
    [
        ([1.0] * 32, ""),
        ([1.0] * 10 + [0.0] * 22, "only 10 of 32 codes were used"),
        ([1000.0, 1000.0] + [1.0] * 30, "32 codes were used in this epoch, but so unevenly that 2 "),
    ],
    ids=["even", "few", "uneven"],
)
def test_few_codes_and_uneven_ones_are_warned_of(counts, warns, caplog):
    stage = TokenizerStage.__new__(TokenizerStage)
    stage.model, stage.revive_dead_codes = types.SimpleNamespace(quantize=golden_quantizer()), True
    stage.model.quantize.cluster_size = torch.tensor(counts)
    usage = stage.end_epoch()
    assert usage["codes_used"] == sum(count > 0 for count in counts)
    line = {f"train_{name}": value for name, value in usage.items()}
    Alarms().tell(stage.find_alarms(line, [], warmed_up=True))
    assert len(caplog.messages) == bool(warns) and warns in "".join(caplog.messages)
    assert "revive_dead_codes" not in caplog.text  # it is on already
