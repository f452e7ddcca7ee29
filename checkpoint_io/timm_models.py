"""timm's models with the weights that were asked for: timm's own, those of a file, or
random ones.
"""

from __future__ import annotations

import logging
import sys
from typing import Any

import timm
import timm.models
import torch
from torch import nn

from checkpoint_io import downloads, weight_files
from errors import UserError, pick

log = logging.getLogger("beit")


TEACHERS_FILE = "`teacher_weight` takes a file or URL that holds them"


def create_timm_model(
    model: str,
    num_classes: int,
    input_size: int | tuple[int, int] | None,
    weight: str | None,
    purpose: str,
    size_name: str = "teacher_input_size",
    advice: str = TEACHERS_FILE,
) -> Any:
    """timm's `model` for images of `input_size` pixels (None: its own size), with
    `num_classes` outputs (0: without a classifier).

    `model`: a name, or `local-dir:` and a folder, or `hf-hub:` and an id. `weight`: a
    path, a URL, None for timm's own weights, "random" for none. In messages `purpose`
    says what the model is for, `size_name` is the parameter of the size, and `advice`
    what helps where the weights cannot be had. UserError: timm cannot build it, or the
    weights cannot be had or do not fit.
    """
    if not model.startswith(("local-dir:", "hf-hub:")):
        pick(dict.fromkeys(timm.list_models()), model.split(".")[0], "timm model")
    size: dict[str, Any] = {} if input_size is None else {"img_size": input_size}
    try:
        try:
            network = timm.create_model(model, num_classes=num_classes, **size)
        except TypeError:  # convolutions take any size
            network = timm.create_model(model, num_classes=num_classes)
    except (AssertionError, RuntimeError, ValueError) as error:
        raise UserError(
            f"timm cannot build {model} for `{size_name}` {input_size}: {summarize_error(error)}"
        ) from error
    except OSError as error:  # a folder or a repository that is not there
        raise UserError(f"timm cannot open {model} ({summarize_error(error)})") from error
    # timm's convention: a family's module converts foreign checkpoints (OpenAI's names,
    # another grid) under this name.
    convert = getattr(sys.modules[type(network).__module__], "checkpoint_filter_fn", None)
    if weight is None:
        known = model.startswith("local-dir:")  # there is nothing to get, nor to advise
        log.info(f"opening timm's {model}" if known else f"getting timm's weights of {model} ({advice})")
        try:
            timm.models.load_pretrained(network, num_classes=num_classes, filter_fn=convert)
        except Exception as error:  # of any of the libraries through which timm downloads
            raise UserError(
                f"timm's weights of {model} cannot be had ({summarize_error(error)}); {advice}"
            ) from error
    elif weight != "random":
        state = strip_prefixes(
            weight_files.load_state_dict(downloads.fetch(weight), "teacher|student|model|module")
        )
        try:
            state = convert(state, network) if convert else state
        except (AssertionError, AttributeError, KeyError, RuntimeError) as error:
            raise UserError(f"{weight} does not fit {purpose} ({summarize_error(error)})") from error
        load_every_tensor(network, state, f"{weight} does not fit {purpose}")
    return network


def strip_prefixes(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A training run's state dict under the network's own names: DDP's `module.`,
    DINO's `backbone.`, CLIP's tower.
    """
    for prefix in ("module.", "backbone."):
        if any(key.startswith(prefix) for key in state):  # beside backbone.* stands DINO's projection head
            state = {
                key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)
            }
    # timm knows OpenAI's names only in the whole CLIP's dict
    if "class_embedding" in state and "conv1.weight" in state:
        state = {f"visual.{key}": value for key, value in state.items()}
    return state


def load_every_tensor(network: nn.Module, state: dict[str, torch.Tensor], complaint: str) -> None:
    """Load every tensor of `network` from `state`, which may hold more (a classifier).
    UserError, which begins with `complaint`: some are missing.
    """
    wanted = {k: v.shape for k, v in network.state_dict().items() if not k.endswith("num_batches_tracked")}
    lacking = [key for key, shape in wanted.items() if key not in state or state[key].shape != shape]
    if lacking:
        raise UserError(
            f"{complaint}: {len(lacking)} of {len(wanted)} tensors are missing or misshapen "
            f"({', '.join(lacking[:3])}, ...); it holds {', '.join(list(state)[:3])}, ..."
        )
    network.load_state_dict({key: state[key] for key in wanted})


def summarize_error(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:150]}"
