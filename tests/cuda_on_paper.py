"""A GPU on paper: inside `cuda_on_paper()` torch believes in a CUDA device, whose
tensors are fake, without a driver.

Tensors on the CPU are what they always are. Those on "cuda" (`PaperTensor`) say that
they are there, are refused wherever CUDA refuses a mixture of devices, and note who
reads from them and who copies to them; what they hold is computed on the CPU, so that
the code takes the turns that it would take, and its results can be compared with the
CPU's. Autograd runs as it is: it takes them for meta tensors, which need no stream of
a driver. Autocast is CUDA's, whose lists of operations are repeated here, because
torch's own asks for the true device.

Not seen: kernels, memory, several processes, torch.compile.
"""

import contextlib
import functools
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing

aten = torch.ops.aten
CPU, CUDA = torch.device("cpu"), torch.device("cuda:0")
ROOT = Path(__file__).parent.parent

# The host waits for their result, because its shape or its value depends on the data.
WAITING = set(
    "_local_scalar_dense nonzero masked_select _unique _unique2 unique_dim unique_consecutive bincount equal "
    "unique_dim_consecutive histc linalg_eigh _linalg_eigh _linalg_svd _linalg_solve_ex linalg_inv_ex "
    "linalg_cholesky_ex linalg_lu_factor_ex nanmedian".split()
)


class CudaMistake(RuntimeError):
    """What CUDA refuses, or would compute from memory that is not there yet."""


class Note(NamedTuple):
    """Something that makes the host wait for the device."""

    kind: str  # "read": device -> host; "copy": host -> device that waits, or from pageable memory
    what: str
    where: str  # file:line of this project
    function: str


class Paper:
    """What happened since the context began."""

    def __init__(self) -> None:
        self.notes: list[Note] = []
        self.pinned: dict[int, Any] = {}  # address of page-locked memory -> its storage, kept alive
        self.streams: list[PaperStream] = [PaperStream()]
        self.seeds: list[int] = []  # given to the device's generator
        self.products: set[torch.dtype] = set()  # of matrices, in these dtypes

    def note(self, kind: str, what: str) -> None:
        self.notes.append(Note(kind, what, *caller()))

    @contextlib.contextmanager
    def noting(self) -> Iterator[list[Note]]:
        """The notes of a block, in a list that is filled at its end."""
        found: list[Note] = []
        start = len(self.notes)
        try:
            yield found
        finally:
            found += self.notes[start:]

    def pin(self, tensor: torch.Tensor) -> torch.Tensor:
        if isinstance(tensor, PaperTensor):
            raise CudaMistake("only CPU memory can be pinned")
        copy = tensor.clone()
        storage = copy.untyped_storage()
        self.pinned[storage.data_ptr()] = storage
        return copy

    def is_pinned(self, tensor: torch.Tensor) -> bool:
        return tensor.untyped_storage().data_ptr() in self.pinned


def caller() -> tuple[str, str]:
    """The innermost line of this project, without the tests, that led here, and its
    function.
    """
    frame: Any = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if name.startswith(f"{ROOT}/") and not name.startswith((f"{ROOT}/.venv/", f"{ROOT}/tests/")):
            return f"{name[len(str(ROOT)) + 1 :]}:{frame.f_lineno}", frame.f_code.co_name
        frame = frame.f_back
    return "tests", ""


paper: Paper | None = None  # of the context under way


# ── Streams ──
class PaperStream:
    """The order of what runs on it is a count; what another stream may rely on is what
    it has waited for.
    """

    device = CUDA

    def __init__(self, *_: Any, **__: Any) -> None:
        self.time = 0
        self.seen: dict[PaperStream, int] = {}

    def wait_stream(self, other: "PaperStream") -> None:
        self.seen[other] = other.time

    def is_capturing(self) -> bool:
        return False

    def synchronize(self) -> None:
        assert paper is not None
        paper.note("read", "synchronize")


@contextlib.contextmanager
def on_stream(stream: PaperStream) -> Iterator[None]:
    assert paper is not None
    paper.streams.append(stream)
    try:
        yield
    finally:
        paper.streams.pop()


# ── Tensors ──
class PaperTensor(torch.Tensor):
    """A tensor on "cuda": a meta tensor for torch's C++, with values (`inner`, on the
    CPU).
    """

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> "PaperTensor":
        meta = torch.empty_strided(inner.shape, inner.stride(), dtype=inner.dtype, device="meta")
        tensor: PaperTensor = torch.Tensor._make_subclass(cls, meta, False, device_for_backend_keys=CUDA)
        tensor.inner = inner
        assert paper is not None
        stream = paper.streams[-1]
        stream.time += 1
        tensor.made = (stream, stream.time)
        tensor.recorded = {stream}
        return tensor

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})

    device = property(lambda self: CUDA)
    is_cuda = property(lambda self: True)
    is_meta = is_cpu = property(lambda self: False)
    data = property(lambda self: self.detach(), lambda self, value: setattr(self, "inner", value.inner))

    def get_device(self) -> int:
        return 0

    def record_stream(self, stream: PaperStream) -> None:
        self.recorded.add(stream)

    def to(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Where it is already it stays the same tensor."""
        device, dtype, non_blocking, memory_format = torch._C._nn._parse_to(*args, **_parsable(kwargs))
        copy, moves = kwargs.get("copy", False), device is not None and device.type == "cpu"
        if not moves and not copy and dtype in (None, self.dtype) and memory_format is None:
            return self
        given = {"dtype": dtype or self.dtype, "non_blocking": non_blocking, "memory_format": memory_format}
        return aten._to_copy.default(self, device=CPU if moves else CUDA, **given)

    def tolist(self) -> Any:
        return read(self, "tolist").tolist()

    def numpy(self, *_: Any, **__: Any) -> Any:
        raise CudaMistake("can't convert a cuda tensor to numpy: use Tensor.cpu() first")

    __array__ = numpy

    def __deepcopy__(self, memo: dict[int, Any]) -> "PaperTensor":
        if id(self) not in memo:
            copy = self.detach().clone().requires_grad_(self.requires_grad)
            if getattr(self, "_is_param", False):
                copy._is_param = True
            memo[id(self)] = copy
        return memo[id(self)]

    def __repr__(self, **_: Any) -> str:
        values = "values unknown" if paper is None else read(self, "repr").tolist()
        return f"PaperTensor({values}, {self.dtype})"

    def __reduce_ex__(self, _: Any) -> Any:
        raise CudaMistake("a tensor on the device is pickled: copy it to the CPU first")


def _parsable(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in kwargs.items() if name != "copy"}


def read(tensor: PaperTensor, what: str) -> torch.Tensor:
    assert paper is not None
    paper.note("read", what)
    return tensor.inner


# ── Operations ──
class PaperMode(TorchDispatchMode):
    """For operations without a tensor on the device among their arguments, such as
    torch.zeros(3, device="cuda").
    """

    def __init__(self) -> None:
        super().__init__()
        self._mode_key = torch._C._TorchDispatchModeKey.FAKE  # else torch would start CUDA first

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


def unwrap(value: Any, found: list[torch.Tensor]) -> Any:
    """An argument as the CPU takes it; its tensors are added to `found`."""
    if isinstance(value, torch.Tensor):
        found.append(value)
        return value.inner if isinstance(value, PaperTensor) else value
    return [unwrap(part, found) for part in value] if isinstance(value, (list, tuple)) else value


def wrap(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return PaperTensor(value)
    return type(value)(wrap(part) for part in value) if isinstance(value, (list, tuple)) else value


def run(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """An operation below autograd and autocast."""
    tensors: list[torch.Tensor] = []
    plain_args = tuple(unwrap(value, tensors) for value in args)
    plain_kwargs = {key: unwrap(value, tensors) for key, value in kwargs.items()}
    on_paper = [tensor for tensor in tensors if isinstance(tensor, PaperTensor)]
    device = kwargs.get("device")
    there = bool(on_paper) if device is None else torch.device(device).type in ("cuda", "meta")
    if not on_paper and not there:
        return func(*args, **kwargs)
    assert paper is not None, "a tensor of cuda_on_paper is used after it"
    name = func.overloadpacket.__name__
    if name == "_fused_sdp_choice":
        return 0  # step by step
    for tensor in on_paper:
        check_stream(tensor)
    if name in ("_to_copy", "copy_"):
        note_copy(name, args, kwargs, there)
        there = isinstance(args[0], PaperTensor) if name == "copy_" else there
    else:
        check_devices(func, name, args, kwargs, tensors)
        note_waiting(name, args)
        if name in ("mm", "addmm", "bmm", "baddbmm"):
            paper.products.add(on_paper[-1].dtype)
    if device is not None:
        plain_kwargs["device"] = CPU
    plain_kwargs.pop("non_blocking", None)
    out = func(*plain_args, **plain_kwargs)
    if not there:
        return args[0] if name == "copy_" else out
    out = wrap(out)
    return return_and_correct_aliasing(func, args, kwargs, out)


def check_stream(tensor: PaperTensor) -> None:
    assert paper is not None
    stream, (made_on, time) = paper.streams[-1], tensor.made
    if stream is made_on:
        return
    if stream.seen.get(made_on, -1) < time:
        raise CudaMistake("a tensor is used on a stream that has not waited for the one that computes it")
    if stream not in tensor.recorded:
        raise CudaMistake("a tensor of another stream is used without record_stream: its memory may go")


def note_copy(name: str, args: tuple[Any, ...], kwargs: dict[str, Any], there: bool) -> None:
    """Copies between the devices: those that wait."""
    assert paper is not None
    source, target_there = (
        (args[1], isinstance(args[0], PaperTensor)) if name == "copy_" else (args[0], there)
    )
    if isinstance(source, PaperTensor) and not target_there:
        paper.note("read", f"copy to the CPU of {tuple(source.shape)}")
    elif target_there and not isinstance(source, PaperTensor):
        non_blocking = (
            kwargs.get("non_blocking", len(args) > 2 and args[2])
            if name == "copy_"
            else kwargs.get("non_blocking", False)
        )
        if not paper.is_pinned(source):
            paper.note("copy", f"from pageable memory of {tuple(source.shape)}")
        elif not non_blocking:
            paper.note("copy", f"without non_blocking of {tuple(source.shape)}")


def note_waiting(name: str, args: tuple[Any, ...]) -> None:
    assert paper is not None
    if name in WAITING or (name == "repeat_interleave" and len(args) > 1):
        paper.note("read", name)
    if name not in INDEXING:
        return
    indices = [index for index in args[1] if index is not None]
    one_value = len(args) > 2 and args[2].numel() == 1  # computed as masked_fill
    if any(index.dtype in (torch.bool, torch.uint8) for index in indices) and not one_value:
        paper.note("read", f"{name} by a mask")
    if any(not isinstance(index, PaperTensor) for index in indices):
        paper.note("copy", f"of the indices of {name}")


INDEXING = ("index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index")


def check_devices(
    func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], tensors: list[torch.Tensor]
) -> None:
    """A tensor on the CPU beside one on the device: CUDA takes single numbers where it
    works element by element, and indices.
    """
    strangers = [tensor for tensor in tensors if not isinstance(tensor, PaperTensor)]
    if name in INDEXING and isinstance(args[0], PaperTensor):
        indices = [id(index) for index in args[1] if index is not None]
        strangers = [tensor for tensor in strangers if id(tensor) not in indices and tensor.ndim]
    elif torch.Tag.pointwise in func.tags or name in (
        "where",
        "fill_",
        "fill",
        "masked_fill",
        "masked_fill_",
    ):
        strangers = [tensor for tensor in strangers if tensor.ndim]
    if strangers and len(strangers) < len(tensors):
        shapes = [tuple(tensor.shape) for tensor in strangers]
        raise CudaMistake(f"{name}: all tensors must be on one device, on the CPU are those of {shapes}")
    generator = kwargs.get("generator")
    if generator is not None:
        raise CudaMistake(f"{name}: expected a generator of cuda, not of {generator.device}")


# ── Autocast ──
LOWER = (
    "_convolution _convolution.deprecated conv1d conv2d conv3d conv_tbc conv_transpose1d "
    "conv_transpose2d.input conv_transpose3d.input convolution prelu addmm addmv addr matmul einsum mm mv "
    "linalg_vecdot linear addbmm baddbmm bmm chain_matmul linalg_multi_dot scaled_dot_product_attention"
).split()
WIDEST = "addcdiv addcmul atan2 bilinear cross dot vdot grid_sampler index_put tensordot scatter_add".split()
SINGLE = (
    "acos asin cosh erfinv exp expm1 log log10 log2 log1p reciprocal rsqrt sinh tan pow.Tensor_Scalar "
    "pow.Tensor_Tensor pow.Scalar softplus layer_norm native_layer_norm group_norm nuclear_norm "
    "cosine_similarity poisson_nll_loss cosine_embedding_loss nll_loss nll_loss2d hinge_embedding_loss "
    "kl_div l1_loss smooth_l1_loss huber_loss mse_loss margin_ranking_loss multilabel_margin_loss "
    "soft_margin_loss triplet_margin_loss multi_margin_loss binary_cross_entropy_with_logits dist pdist "
    "cdist renorm logsumexp upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_linear1d "
    "upsample_bilinear2d _upsample_bilinear2d_aa upsample_trilinear3d upsample_bicubic2d "
    "_upsample_bicubic2d_aa norm.Scalar norm.ScalarOpt_dim"
).split()
SINGLE_BY_DTYPE = (
    "prod prod.dim_int softmax.int log_softmax.int cumprod cumsum linalg_vector_norm linalg_matrix_norm "
    "linalg_matrix_norm.str_ord sum sum.dim_IntList"
).split()


def is_low(tensor: Any) -> bool:
    return tensor.is_floating_point() and tensor.dtype != torch.float64


def cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, PaperTensor):
        return value.to(dtype) if is_low(value) else value
    return [cast(part, dtype) for part in value] if isinstance(value, list) else value


def autocast_kernel(op: Any, kind: str, *args: Any, **kwargs: Any) -> Any:
    """What CUDA's autocast makes of an operation (torch's autocast_mode.h)."""
    found: list[torch.Tensor] = []
    unwrap([*args, *kwargs.values()], found)
    floats = [tensor for tensor in found if isinstance(tensor, PaperTensor) and is_low(tensor)]
    dtype: torch.dtype | None = torch.float32
    any_single = any(tensor.dtype == torch.float32 for tensor in floats)
    if kind == "lower" or (kind == "widest" and not any_single):
        dtype = torch.get_autocast_dtype("cuda")
    elif kind == "by dtype":
        position = [argument.name for argument in op._schema.arguments].index("dtype")
        unset = kwargs.get("dtype") is None and (len(args) <= position or args[position] is None)
        if unset and isinstance(args[0], PaperTensor) and is_low(args[0]):
            kwargs = {**kwargs, "dtype": torch.float32}
            args = args[:position]
        dtype = None
    without = torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCUDA))
    with without:
        if dtype is not None:
            args = tuple(cast(value, dtype) for value in args)
            kwargs = {key: cast(value, dtype) for key, value in kwargs.items()}
        return op(*args, **kwargs)


@contextlib.contextmanager
def autocast_on_paper() -> Iterator[None]:
    library = torch.library.Library("aten", "IMPL")
    kinds = {"lower": LOWER, "widest": WIDEST, "single": SINGLE, "by dtype": SINGLE_BY_DTYPE}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for kind, names in kinds.items():
                for name in names:
                    packet, _, overload = name.partition(".")
                    op = getattr(getattr(aten, packet), overload or "default")
                    library.impl(name, functools.partial(autocast_kernel, op, kind), "AutocastCUDA")
        yield
    finally:
        library._destroy()


# ── The context ──
@contextlib.contextmanager
def cuda_on_paper() -> Iterator[Paper]:
    """Torch has one CUDA device, on paper."""
    global paper
    own = Paper()
    cuda: dict[str, Any] = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "device": lambda device: contextlib.nullcontext(),
        "get_device_capability": lambda device=None: (9, 0),
        "get_arch_list": lambda: ["sm_90"],
        "get_device_name": lambda device=None: "GPU on paper",
        # a card whose peak is known, so that FLOPs are counted
        "get_device_properties": lambda device=None: SimpleNamespace(
            name="NVIDIA H100", total_memory=80 * 2**30
        ),
        "is_bf16_supported": lambda *_, **__: True,
        "is_current_stream_capturing": lambda: False,
        "max_memory_allocated": lambda device=None: 0,
        "manual_seed": own.seeds.append,  # its random numbers are those of the CPU's generator
        "get_rng_state": lambda *_: torch.get_rng_state(),
        "set_rng_state": lambda state, *_: torch.set_rng_state(state),
        "synchronize": lambda device=None: own.note("read", "synchronize"),
        "Stream": PaperStream,
        "current_stream": lambda device=None: own.streams[-1],
        "stream": on_stream,
    }
    accelerator: dict[str, Any] = {
        "is_available": lambda: True,
        "current_accelerator": lambda *_, **__: CUDA,
        "current_stream": lambda device=None: own.streams[-1],
    }
    lift_only_cpu = torch._C._only_lift_cpu_tensors()
    overwrite = torch.__future__.get_overwrite_module_params_on_conversion()

    with contextlib.ExitStack() as stack:
        for name, value in cuda.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, value))
        for name, value in accelerator.items():
            stack.enter_context(mock.patch.object(torch.accelerator, name, value))
        for name, value in (("pin_memory", own.pin), ("is_pinned", own.is_pinned)):
            method = functools.partialmethod(lambda tensor, *_, call=value: call(tensor))
            stack.enter_context(mock.patch.object(torch.Tensor, name, method))
        forget_cached()
        stack.callback(forget_cached)
        # torch.tensor(1, device="cuda"): made on the CPU, then copied
        stack.callback(torch._C._set_only_lift_cpu_tensors, lift_only_cpu)
        torch._C._set_only_lift_cpu_tensors(True)
        # Module.to: new parameters instead of new contents of the old ones
        stack.callback(torch.__future__.set_overwrite_module_params_on_conversion, overwrite)
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        stack.enter_context(autocast_on_paper())
        paper = own
        stack.callback(_forget)
        stack.enter_context(PaperMode())
        yield own


def _forget() -> None:
    global paper
    paper = None


def forget_cached() -> None:
    """What the project's functions keep of a device: its constants, its stream."""
    for module in list(sys.modules.values()):
        path = Path(getattr(module, "__file__", None) or "/")
        if path.is_relative_to(ROOT) and ".venv" not in path.parts:
            for value in list(vars(module).values()):
                if isinstance(value, functools._lru_cache_wrapper):
                    value.cache_clear()
