"""torch.export and torch.jit.trace take every model, with batches and images of any
size.
"""

import pytest
import torch
from tiny_runs import STUDENT

import modeling_finetune
import modeling_pretrain
import modeling_segmentation
import modeling_vqkd
from layers import rel_pos_bias


class Method(torch.nn.Module):
    """A model whose forward is one of its methods."""

    def __init__(self, model, name, **kwargs):
        super().__init__()
        self.model, self.name, self.kwargs = model, name, kwargs

    def forward(self, *args):
        return getattr(self.model, self.name)(*args, **self.kwargs)


BIAS = {"use_abs_pos_emb": False, "init_values": 0.1}


def exported_model(name):
    """Of random weights, and how many inputs it takes: images, or images and masks."""
    torch.manual_seed(0)
    size = {"img_size": 32}
    if name == "classifier":
        model = modeling_finetune.create_model(
            "beit_demo_patch16_128", **size, **BIAS, use_rel_pos_bias=True, num_classes=3
        )
    elif name == "tokenizer":
        model = modeling_vqkd.create_model(
            "vqkd_encoder_demo_decoder_1x128x4_hog", **size, n_code=256, code_dim=8, as_tokenizer=True
        )
    elif name in ("upernet", "setr_pup"):
        model = modeling_segmentation.create_model(
            f"{name}_beit_demo_patch16", 3, **size, **BIAS, use_rel_pos_bias=True
        )
    else:
        model = modeling_pretrain.create_model(
            name, **size, **BIAS, use_shared_rel_pos_bias=True, vocab_size=16, early_layers=4
        )
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


PRETRAINING = ("beit_demo_patch16_128_8k_vocab", STUDENT)


EXPORTED = {
    "classifier": lambda: (exported_model("classifier"), 1),
    "codes": lambda: (Method(exported_model("tokenizer"), "get_codebook_indices"), 1),
    "vectors": lambda: (Method(exported_model("tokenizer"), "encode"), 1),
    "masked patches": lambda: (exported_model(PRETRAINING[0]), 2),
    "masked patches, CLS": lambda: (exported_model(PRETRAINING[1]), 2),
    "all patches, CLS": lambda: (
        Method(exported_model(PRETRAINING[1]), "forward", return_all_tokens=True),
        2,
    ),
    "upernet": lambda: (exported_model("upernet"), 1),
    "setr_pup": lambda: (exported_model("setr_pup"), 1),
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("way", ["export", "trace"])
@pytest.mark.parametrize("name", EXPORTED)
def test_an_exported_model_takes_batches_of_any_size(name, way):
    model, count = EXPORTED[name]()
    generator = torch.Generator().manual_seed(1)
    inputs = (torch.rand(5, 3, 32, 32, generator=generator), torch.rand(5, 4, generator=generator) > 0.5)[
        :count
    ]
    two = tuple(x[:2] for x in inputs)
    with torch.no_grad():
        if way == "trace":
            exported = torch.jit.trace(model, two, check_trace=False)
        else:
            shapes = tuple({0: torch.export.Dim("batch")} for _ in two)
            exported = torch.export.export(
                model, two, dynamic_shapes=(shapes,) if isinstance(model, Method) else shapes
            ).module()
        for batch in (1, 3, 5):
            some = tuple(x[:batch] for x in inputs)
            torch.testing.assert_close(exported(*some), model(*some), atol=1e-6, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("way", ["export", "trace"])
@pytest.mark.parametrize("name", ["upernet", "setr_pup"])
def test_an_exported_segmenter_takes_images_of_any_size(name, way):
    model = exported_model(name)
    x = torch.rand(2, 3, 70, 90, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        if way == "trace":
            exported = torch.jit.trace(model, x, check_trace=False)
        else:
            # of UPerNet's sizes torch cannot prove that half of them is a size: AUTO
            # checks when called
            dim = torch.export.Dim
            sides = (
                {2: dim.AUTO, 3: dim.AUTO}
                if name == "upernet"
                else {2: dim("height", min=64), 3: dim("width", min=64)}
            )
            sizes = {0: dim.AUTO if name == "upernet" else dim("batch"), **sides}
            exported = torch.export.export(model, (x,), dynamic_shapes=(sizes,)).module()
        for shape in ((1, 3, 64, 64), (3, 3, 96, 160), (2, 3, 100, 75)):
            images = torch.rand(shape, generator=torch.Generator().manual_seed(2))
            torch.testing.assert_close(exported(images), model(images), atol=2e-6, rtol=1e-6)


@pytest.mark.parametrize("src", [1, 2, 3, 14])
@pytest.mark.parametrize("dst", [1, 2, 5, 14, 32])
def test_tables_are_stretched_in_an_export_as_elsewhere(src, dst):
    expected = torch.from_numpy(rel_pos_bias.resize_matrix(src, dst))
    torch.testing.assert_close(rel_pos_bias.dynamic_resize_matrix(src, dst), expected, atol=1e-9, rtol=0)
