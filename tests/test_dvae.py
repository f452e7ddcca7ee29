"""BEiT v1's tokenizer: the golden values, OpenAI's own package, its pickled files read
without running code.
"""

from __future__ import annotations

import collections
import pathlib
import types
from typing import Any

import pytest
import torch
from golden_values import arrays, close, data, fill_module, images
from refusals import user_reads
from tiny_runs import RunsCode
from torch import nn

from checkpoint_io.pickle_builders import PickledObject
from errors import UserError
from modeling_dvae import PATCH_SIZE, DallEEncoder, load_dall_e_encoder, map_pixels, pickled_parameters

TINY = dict(n_hid=64, n_blk_per_group=1, vocab_size=512)  # the least that OpenAI's package allows
SIZES = dict(n_hid=72, n_blk_per_group=2, vocab_size=520)  # no size follows from another


@pytest.fixture(scope="module")
def dall_e() -> types.ModuleType:
    return pytest.importorskip(
        "dall_e", reason=("pip install -r requirements-dev.txt (OpenAI's dall-e is not installed)")
    )


def filled(model: Any) -> Any:
    """The golden file's weights (tests/golden/README.md, dalle_tiny)."""
    state = {}
    for key, value in model.state_dict().items():
        noise = torch.from_numpy(fill_module.fill_array(key, tuple(value.shape), 400)) / 0.05
        state[key] = noise / value[0].numel() ** 0.5 if key.endswith(".w") else 0.05 * noise
    model.load_state_dict(state)
    return model


def state_of(**sizes: int) -> dict[str, torch.Tensor]:
    return dict(DallEEncoder(**(sizes or TINY)).state_dict())


def assert_keys(model: nn.Module, case: str) -> None:
    assert {key: list(value.shape) for key, value in model.state_dict().items()} == data("teacher_keys")[case]


def saved(content: Any, path: pathlib.Path, new_format: bool = True) -> str:
    torch.save(content, path, _use_new_zipfile_serialization=new_format)
    return str(path)


# ── numbers ──
def test_golden_values() -> None:
    model, golden = DallEEncoder(**TINY), arrays("dalle_tiny")
    assert_keys(model, "dalle_encoder_tiny")
    x = images(2, 32, 401)
    logits = filled(model)(map_pixels(x))
    close(logits[:, ::32], golden["logits"])
    codes = model.get_codebook_indices(x)
    assert codes.dtype == torch.int64
    assert torch.equal(codes, golden["ids"].flatten(1))


def test_published_sizes_and_names() -> None:
    with torch.device("meta"):
        model = DallEEncoder()
    assert_keys(model, "dalle_encoder_full")
    assert (model.n_hid, model.n_blk_per_group, model.vocab_size, PATCH_SIZE) == (256, 2, 8192, 8)
    assert model.blocks.group_3.block_2.gain == 1 / 64  # (4 groups x 2 blocks)^2


def test_same_as_the_package_on_any_grid(dall_e: types.ModuleType) -> None:
    theirs = dall_e.Encoder(**SIZES)
    mine = DallEEncoder(**SIZES)
    mine.load_state_dict(theirs.state_dict())
    x = torch.rand(2, 3, 24, 40)
    close(map_pixels(x), dall_e.map_pixels(x), atol=1e-7)
    logits = theirs(dall_e.map_pixels(x))
    assert logits.shape == (2, 520, 3, 5)
    close(mine(map_pixels(x)), logits, atol=1e-5)
    assert torch.equal(mine.get_codebook_indices(x), logits.argmax(1).flatten(1))


def test_frozen_and_fp32_under_a_cpus_autocast() -> None:
    model = filled(DallEEncoder(**TINY)).train()
    assert not any(module.training for module in model.modules())
    assert not any(p.requires_grad for p in model.parameters())
    x, recorded = images(2, 32, 401), []
    with model.register_forward_pre_hook(lambda *_: recorded.append(torch.is_grad_enabled())):
        plain = model.get_codebook_indices(x)
    assert recorded == [False]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(map_pixels(x))
        assert torch.equal(model.get_codebook_indices(x), plain)
    assert logits.dtype == torch.float32
    close(logits, model(map_pixels(x)), atol=0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_fp16_on_a_gpu_under_autocast_is_the_packages(dall_e: types.ModuleType) -> None:
    theirs = dall_e.Encoder(**SIZES).cuda()
    mine = DallEEncoder(**SIZES).cuda()
    mine.load_state_dict(theirs.state_dict())
    x = torch.rand(2, 3, 64, 64, device="cuda")
    logits = theirs(dall_e.map_pixels(x))
    for dtype in (torch.float16, torch.bfloat16):
        with torch.autocast("cuda", dtype=dtype):
            close(mine(map_pixels(x)), logits, atol=3e-3)  # bf16 would be off by 1e-2
    assert mine(map_pixels(x)).dtype == logits.dtype == torch.float32


@pytest.mark.parametrize("size", [(100, 112), (112, 100), (4, 4), (0, 8)])
def test_sides_must_be_multiples_of_8(size: tuple[int, int]) -> None:
    with user_reads(f"multiples of 8 pixels, not {size[0]} x {size[1]}: --second_input_size"):
        DallEEncoder(**TINY).get_codebook_indices(torch.rand(1, 3, *size))


def test_bytes_are_not_taken_for_images() -> None:
    with pytest.raises(ValueError, match=r"in \[0, 1\], not torch.uint8"):
        DallEEncoder(**TINY).get_codebook_indices(torch.zeros(1, 3, 8, 8, dtype=torch.uint8))


# ── files ──
@pytest.mark.parametrize("new_format", [True, False])
def test_the_packages_pickled_encoder(
    tmp_path: pathlib.Path, dall_e: types.ModuleType, new_format: bool
) -> None:
    theirs = dall_e.Encoder(**SIZES)
    path = saved(theirs, tmp_path / "encoder.pkl", new_format)
    mine = load_dall_e_encoder(path)
    # Whatever happens to the file later, the weights are in memory.
    (tmp_path / "encoder.pkl").write_bytes(bytes((tmp_path / "encoder.pkl").stat().st_size))
    assert (mine.n_hid, mine.n_blk_per_group, mine.vocab_size) == tuple(SIZES.values())
    assert {type(module).__module__.split(".")[0] for module in mine.modules()} == {"modeling_dvae", "torch"}
    assert all(type(p) is nn.Parameter and not p.requires_grad for p in mine.parameters())
    x = torch.rand(2, 3, 32, 32)
    logits = theirs(dall_e.map_pixels(x))
    close(mine(map_pixels(x)), logits, atol=1e-5)
    assert torch.equal(mine.get_codebook_indices(x), logits.argmax(1).flatten(1))


@pytest.mark.parametrize("form", ["bare", "model", "state_dict"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_state_dicts(tmp_path: pathlib.Path, form: str, dtype: torch.dtype) -> None:
    state = {key: value.to(dtype) for key, value in state_of(**SIZES).items()}
    path = saved(state if form == "bare" else {form: state, "epoch": 3}, tmp_path / "dvae.pth")
    model = load_dall_e_encoder(path)
    assert all(torch.equal(value, state[key].float()) for key, value in model.state_dict().items())
    assert {value.dtype for value in model.state_dict().values()} == {torch.float32}
    assert not any(p.requires_grad for p in model.parameters())


def test_openais_file_is_the_default(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    saved(state_of(), tmp_path / "hub" / "checkpoints" / "encoder.pkl")  # as if it had been downloaded
    assert load_dall_e_encoder().vocab_size == 512


@pytest.mark.parametrize("new_format", [True, False])
@pytest.mark.parametrize("where", ["module", "state dict", "alone"])
def test_payload_is_refused_and_not_run(tmp_path: pathlib.Path, new_format: bool, where: str) -> None:
    trace = tmp_path / "trace"
    content: Any = RunsCode(trace)
    if where == "module":
        content = pytest.importorskip("dall_e").Encoder(**TINY)
        content.blocks.extra = RunsCode(trace)
    elif where == "state dict":
        content = {**state_of(), "blocks.extra": RunsCode(trace)}
    path = saved(content, tmp_path / "bad.pkl", new_format)
    with pytest.raises(UserError, match=r"bad\.pkl holds Python objects \(\w+\.system\)"):
        load_dall_e_encoder(path)
    assert not trace.exists()
    torch.load(path, weights_only=False)
    assert trace.exists()  # it would have run


@pytest.mark.parametrize("new_format", [True, False])
def test_the_files_classes_are_never_made(
    tmp_path: pathlib.Path, dall_e: types.ModuleType, monkeypatch: pytest.MonkeyPatch, new_format: bool
) -> None:
    path = saved(dall_e.Encoder(**TINY), tmp_path / "encoder.pkl", new_format)
    for kind in (dall_e.Encoder, nn.Sequential, nn.MaxPool2d):
        monkeypatch.setattr(
            kind, "__setstate__", lambda self, state: pytest.fail(f"a {type(self)} was made"), raising=False
        )
    with pytest.raises(pytest.fail.Exception, match="was made"):
        torch.load(path, weights_only=False)
    assert load_dall_e_encoder(path).vocab_size == 512


def test_a_module_within_itself_ends() -> None:
    root = PickledObject()
    vars(root).update(
        _parameters={"w": torch.ones(1)}, _modules={"again": root, "odd": PickledObject(), "no": 3}
    )
    assert list(dict(pickled_parameters(root))) == ["w"]


def test_the_decoder_is_recognized(tmp_path: pathlib.Path, dall_e: types.ModuleType) -> None:
    path = saved(
        dall_e.Decoder(n_init=8, n_hid=64, n_blk_per_group=1, vocab_size=512), tmp_path / "decoder.pkl", False
    )
    with pytest.raises(
        UserError, match=(r"decoder\.pkl is not .* 8 x 512 x 1 x 1 instead of .*, as in " r"its decoder\)")
    ):
        load_dall_e_encoder(path)


def spoiled(**changes: Any) -> dict[str, Any]:
    state = {**state_of(), **{key.replace("__", "."): value for key, value in changes.items()}}
    return {key: value for key, value in state.items() if value is not None}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"head.weight": torch.ones(2)}, r"it has no blocks\.input\.w, but head\.weight"),
        (spoiled(blocks__output__conv__w=None), r"it has no blocks\.output\.conv\.w"),
        (spoiled(blocks__output__conv__w=torch.ones(())), r"blocks\.output\.conv\.w is a single number"),
        (spoiled(blocks__input__w=torch.ones(64, 1, 7, 7)), "64 x 1 x 7 x 7 instead of n_hid x 3 x 7 x 7"),
        (spoiled(blocks__input__b=None), r"blocks\.input\.b is missing"),
        (spoiled(blocks__input__b=torch.ones(63)), r"blocks\.input\.b is 63 instead of 64"),
        (spoiled(blocks__input__b=torch.ones(64, dtype=torch.int8)), r"blocks\.input\.b holds torch\.int8"),
        (
            spoiled(blocks__group_4__block_2__norm=torch.ones(1)),
            r"blocks\.group_4\.block_2\.norm is too much",
        ),
    ],
)
def test_other_files_are_named(tmp_path: pathlib.Path, content: dict[str, Any], message: str) -> None:
    path = saved(collections.OrderedDict(content), tmp_path / "w.pth")
    with pytest.raises(
        UserError,
        match=(rf"w\.pth is not DALL-E's encoder \(.*{message}.*`python " r"model_zoo.py dall_e_encoder`"),
    ):
        load_dall_e_encoder(path)


def test_files_without_weights_are_named(tmp_path: pathlib.Path) -> None:
    for content, message in (
        (nn.Sequential(nn.ReLU()), "holds no weights"),
        ({"epoch": 3}, "holds no weights"),
    ):
        for new_format in (True, False):
            with pytest.raises(UserError, match=message):
                load_dall_e_encoder(saved(content, tmp_path / "w.pkl", new_format))
    for noise in (b"", b"<html>404</html>", b"\x80\x02K\x01.", bytes(range(200))):
        (tmp_path / "w.pkl").write_bytes(noise)
        with pytest.raises(
            UserError, match=(r"w\.pkl(: it is a pickle| is not a weight file, or is incomplete)")
        ):
            load_dall_e_encoder(str(tmp_path / "w.pkl"))
