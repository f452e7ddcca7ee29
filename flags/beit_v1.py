"""BEiT v1's names of the tokenizer's flags in pretraining, so that its command lines
run.
"""

from __future__ import annotations

import argparse
import os

from arguments import Flags, expand_home
from errors import UserError

ENCODER = "encoder.pkl"  # beside decoder.pkl in the published folder


def add_v1_flags(parser: argparse.ArgumentParser) -> None:
    g = parser.add_argument_group("BEiT v1's names (--second_interpolation is then lanczos, as published)")
    g.add_argument(
        "--discrete_vae_weight_path",
        type=expand_home,
        default=None,
        help=f"folder of {ENCODER}, or the file: --tokenizer_model dall-e --tokenizer_weight",
    )
    g.add_argument(
        "--discrete_vae_type",
        default=None,
        choices=("dall-e", "customized"),
        help="dall-e: --tokenizer_model dall-e; no file of the other type was published",
    )


def translate_v1_flags(args: Flags) -> Flags:
    """The same run in today's flags. UserError: flags of both kinds, a folder without
    an encoder, or a tokenizer of which nothing is known.
    """
    folder = args.discrete_vae_weight_path
    if folder is None and args.discrete_vae_type is None:
        return args
    if args.discrete_vae_type == "customized":
        raise UserError(
            "--discrete_vae_type customized: no weights of such a tokenizer were published; take dall-e, or "
            "train a tokenizer of your own (run_vqkd_training.py) for --tokenizer_weight"
        )
    both = sorted(args.given & {"tokenizer_model", "tokenizer_weight"})
    if both:
        raise UserError(
            f"--discrete_vae_weight_path, --discrete_vae_type and --{both[0]} all name a "
            "tokenizer: leave v1's out"
        )
    weight = folder
    if folder is not None and os.path.isdir(folder):
        weight = os.path.join(folder, ENCODER)
        if not os.path.exists(weight):
            raise UserError(
                f"--discrete_vae_weight_path {folder} holds no {ENCODER}: `python model_zoo.py "
                "dall_e_encoder` downloads OpenAI's; name the file or its folder"
            )
    values = {"tokenizer_model": "dall-e", "tokenizer_weight": weight}
    if "second_interpolation" not in args.given:
        values["second_interpolation"] = "lanczos"
    # None: flags.json names the tokenizer once
    values |= {"discrete_vae_weight_path": None, "discrete_vae_type": None}
    return args.replace(**values)
