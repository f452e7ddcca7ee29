"""Parameter groups and schedules against the published ones."""

import numpy as np
import pytest
import torch
from golden_values import arrays, data

import modeling_finetune
import modeling_pretrain
from optim_factory import LayerDecayValueAssigner, cosine_scheduler, get_parameter_groups, layer_decay_values


def described(model, groups):
    names = {id(p): name for name, p in model.named_parameters()}
    return {
        g["name"]: {
            "weight_decay": g["weight_decay"],
            "params": [names[id(p)] for p in g["params"]],
            "lr_scale": g["lr_scale"],
        }
        for g in groups
    }


def assert_groups(mine, golden):
    assert list(mine) == list(golden)
    for name, group in golden.items():
        assert mine[name]["params"] == group["params"], name
        assert mine[name]["weight_decay"] == group["weight_decay"]
        assert mine[name]["lr_scale"] == pytest.approx(group["lr_scale"], rel=1e-12)


def test_groups_of_layer_wise_decay():
    facts = data("layer_decay_groups")
    with torch.device("meta"):
        model = modeling_finetune.beit_base_patch16_224(
            use_abs_pos_emb=False, use_rel_pos_bias=True, init_values=0.1
        )
    assigner = LayerDecayValueAssigner(layer_decay_values(facts["layer_decay"], depth=12))
    groups = get_parameter_groups(
        model, facts["weight_decay"], model.no_weight_decay(), assigner.get_layer_id, assigner.get_scale
    )
    assert_groups(described(model, groups), facts["groups"])


def test_groups_of_pretraining():
    facts = data("pretrain_groups")
    with torch.device("meta"):
        model = modeling_pretrain.beit_base_patch16_224_8k_vocab_cls_pt(
            use_abs_pos_emb=False,
            use_shared_rel_pos_bias=True,
            init_values=0.1,
            early_layers=9,
            head_layers=2,
        )
    groups = get_parameter_groups(model, facts["weight_decay"], model.no_weight_decay())
    assert_groups(described(model, groups), facts["groups"])


def test_the_shared_bias_table_belongs_to_the_last_layer():
    assigner = LayerDecayValueAssigner(layer_decay_values(0.5, depth=4))
    assert assigner.get_layer_id("rel_pos_bias.relative_position_bias_table") == 5
    assert assigner.get_scale(5) == 1.0
    assert assigner.get_scale(assigner.get_layer_id("mask_token")) == 0.5**5


def test_schedules():
    golden = arrays("schedules")
    close = dict(rtol=1e-9, atol=1e-12)
    lr = cosine_scheduler(1.5e-3, 1e-5, 12, 7, warmup_epochs=3)
    np.testing.assert_allclose(lr, golden["lr"].numpy(), **close)
    np.testing.assert_allclose(
        cosine_scheduler(1.5e-3, 1e-5, 12, 7, warmup_steps=10), golden["lr_steps"].numpy(), **close
    )
    np.testing.assert_allclose(cosine_scheduler(0.05, 0.2, 12, 7), golden["wd"].numpy(), **close)
    assert lr[0] == 0 and lr[20] == 1.5e-3  # first step, end of the warm-up
    assert lr[-1] > 1e-5  # the last step stands one short of the final value, as published


def test_a_warm_up_longer_than_the_run_is_cut():
    values = cosine_scheduler(1.0, 0.0, epochs=2, niter_per_ep=3, warmup_epochs=10)
    assert len(values) == 6 and (np.diff(values) > 0).all() and values[-1] < 1
