"""The papers' orderings at their size, on ImageNet-1k (scripts/evidence_imagenet.sh calls
this): what it would take, the runs, the table.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

import openmp_spin  # noqa: E402, F401, I001
import arguments  # noqa: E402
from errors import UserError, report_user_errors  # noqa: E402
from evidence import imagenet  # noqa: E402
from runtime.cards import CARDS  # noqa: E402

RESULTS = ROOT / "docs/evidence/imagenet"


def get_parser() -> argparse.ArgumentParser:
    parser = arguments.new_parser("The papers' orderings at their size", "--gpu A100-80GB --price 2.5")
    add = parser.add_argument
    add("--run", action="store_true", help="run what is missing; needs --data_path and --output_dir")
    add("--tables", action="store_true", help="print the table of the results that are there")
    add(
        "--variants",
        nargs="+",
        default=list(imagenet.VARIANTS),
        choices=list(imagenet.VARIANTS),
        help="only these",
    )
    add("--seeds", type=arguments.seed, nargs="+", default=[0], help="each is a run of its own")
    add("--data_path", type=arguments.expand_home, default="", help="ImageNet-1k, with train/ and val/")
    add("--output_dir", type=arguments.expand_home, default="", help="checkpoints and logs")
    add("--gpu", default="A100-80GB", choices=list(CARDS), help="for the hours and the price")
    add("--price", type=arguments.not_negative_number, default=2.5, help="of an hour of one GPU")
    return parser


@report_user_errors
def main(argv: list[str] | None = None) -> None:
    args = arguments.parse(get_parser(), argv)
    if args.run:
        if not args.data_path or not args.output_dir:
            raise UserError("--run needs --data_path (ImageNet-1k, with train/ and val/) and --output_dir")
        for seed in args.seeds:
            for name in args.variants:
                imagenet.run(name, seed, args.data_path, Path(args.output_dir).absolute(), RESULTS)
    if args.run or args.tables:
        imagenet.print_table(RESULTS)
    else:
        imagenet.print_plan(args.variants, args.gpu, args.price)


if __name__ == "__main__":
    main()
