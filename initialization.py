"""A run that starts from weights: what the new model is given for them, and what of them
goes into it.

At first the model computes what its source did: it has all positions of the source, and
positions that the source lacks start at 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import pretrained
from checkpoint_io import weight_source
from checkpoint_io.weight_formats import NORM_EPS, infer_trunk_parts
from checkpoint_io.weight_source import WeightSource
from errors import ParameterError, UserError
from runtime.terminal import log
from transforms import normalization_of
from vit_backbone import Trunk

NORMS = ("norm", "fc_norm")  # the last one: of all tokens, or of the patches


@dataclass(frozen=True)
class InitialWeights:
    """`origin` names them in messages: "`init_from` out/pt.pth"."""

    content: WeightSource
    origin: str

    @property
    def parts(self) -> dict[str, Any]:
        """As infer_trunk_parts."""
        return infer_trunk_parts(self.content.weights)

    def extend(self, positions: dict[str, bool]) -> dict[str, Any]:
        """Options of a trunk: `positions` (`use_abs_pos_emb`, `use_shared_rel_pos_bias`)
        and those of the weights, and the `norm_eps` of these. A bias of each block takes
        the place of a shared one.

        ParameterError: the weights have a relative position bias where none is wanted.
        """
        theirs = self.parts
        each, shared = theirs["use_rel_pos_bias"], theirs["use_shared_rel_pos_bias"]
        wanted = positions["use_shared_rel_pos_bias"]
        if (each or shared) and not wanted:
            raise ParameterError(
                f"{self.origin} was trained with a relative position bias, without which it would compute "
                "something else: leave out `disable_rel_pos_bias`"
            )
        return {
            "norm_eps": theirs["norm_eps"],
            "use_abs_pos_emb": positions["use_abs_pos_emb"] or theirs["use_abs_pos_emb"],
            "use_rel_pos_bias": each,
            "use_shared_rel_pos_bias": shared or (wanted and not each),
        }

    def load(self, model: Trunk, without: Sequence[str] = ()) -> set[str]:
        """Load what fits and say what was used; returns the names of the model's
        parameters that are not new.

        without: beginnings of names that are left out. UserError: as
        pretrained.load_fitting; another number of heads.
        """
        heads = self.content.external.num_heads
        if heads not in (None, model.blocks[0].attn.num_heads):
            raise UserError(
                f"{self.origin} has {heads} heads, this model {model.blocks[0].attn.num_heads}: name the "
                "`model` that it is of"
            )
        weights = rename_norm(self.content.weights, model)
        kept = {key: value for key, value in weights.items() if not key.startswith(tuple(without))}
        new = pretrained.load_fitting(model, kept, self.origin)
        if weights is not self.content.weights:
            log.info("           renamed    the last norm")
        if len(kept) < len(weights):
            names = ", ".join(key for key in weights if key not in kept)
            log.info(f"           left out   {names}: they predict another tokenizer's codes")
        return {name for name, _ in model.named_parameters()} - set(new)

    def warn_of_other_normalization(
        self, mean: Sequence[float], std: Sequence[float], parameter: str
    ) -> None:
        """`mean`, `std`: of this run's images; `parameter`: what they follow from."""
        prepared = self.content.external.prepared
        flags = weight_source.translate_process_type(self.content.flags)
        if prepared is None and not {"mean_std", "imagenet_default_mean_and_std"} & flags.keys():
            return
        theirs = prepared[:2] if prepared else normalization_of(flags)
        ours = (tuple(mean), tuple(std))
        if len(theirs[0]) == len(ours[0]) and tuple(map(tuple, theirs)) != ours:
            before, now = (f"mean {numbers[0]} and std {numbers[1]}" for numbers in (theirs, ours))
            log.warning(
                f"warning: {self.origin} was trained on images of {before}, this run's are of {now}: see "
                f"`{parameter}`, unless the change is meant"
            )


def read_initial_weights(source: str, of_encoder: bool = False) -> InitialWeights | None:
    """None for ""; UserError as weight_source.read_weights. `of_encoder`: of a
    tokenizer's file those of its encoder.
    """
    if not source:
        return None
    content = weight_source.read_weights(source, origin="`init_from`")
    eps = content.external.norm_eps
    if eps not in (None, NORM_EPS):
        content.weights["norm_eps"] = torch.tensor(eps, dtype=torch.float64)
    if of_encoder and "quantize.embedding.weight" in content.weights:
        start = "encoder."
        encoder = {k.removeprefix(start): v for k, v in content.weights.items() if k.startswith(start)}
        content = content._replace(weights=encoder)
        log.info("tokenizer  the encoder starts from another tokenizer's; its codes and decoder are new")
    return InitialWeights(content, f"`init_from` {source}")


def list_frozen(model: nn.Module, old: set[str], freeze_epochs: int) -> set[str]:
    """The parameters that do not learn in the first `freeze_epochs`: the old ones.
    ParameterError: there are no others.
    """
    if freeze_epochs and all(name in old for name, _ in model.named_parameters()):
        raise ParameterError(
            f"`freeze_epochs` {freeze_epochs}: `init_from` gives all parts of this model, so nothing is "
            "left that could learn first: leave it out"
        )
    return old if freeze_epochs else set()


def rename_norm(weights: dict[str, Tensor], model: Trunk) -> dict[str, Tensor]:
    """The last norm under the name that the model has for it; the same object where it is so already.

    Applied to each token, as pretraining and the tokenizer do it, they are the same.
    """
    own = next((norm for norm in NORMS if f"{norm}.weight" in model.state_dict()), None)
    other = next((norm for norm in NORMS if f"{norm}.weight" in weights), None)
    if own is None or other is None or f"{own}.weight" in weights:
        return weights
    return {
        f"{own}{key.removeprefix(other)}" if key.startswith(f"{other}.") else key: value
        for key, value in weights.items()
    }
