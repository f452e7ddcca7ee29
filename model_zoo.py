"""Weights by name, path or URL: find them, download them once, check them.

`python model_zoo.py` prints the published weights with the accuracy that was published
for each; `python model_zoo.py NAME ...` downloads them (say, on a login node) and
prints where they lie.

BEIT_MIRRORS names copies of the published files: base URLs (https:// or file://, blanks
between them), tried in turn before the published address. A base ends where the
published folder begins (`BASE/BEiT-v2/NAME.pth`, `BASE/v1.0/NAME.pth`,
`BASE/dall-e/encoder.pkl`), or holds the bare files (`BASE/NAME.pth`); both are asked
for, in this order.
"""

from __future__ import annotations

import openmp_spin  # noqa: F401

from collections.abc import Sequence

from checkpoint_io.downloads import fetch, get_cache_folder
from checkpoint_io.published import ENTRIES, PublishedFile
from errors import ArgumentParser, pick, report_user_errors
from runtime.terminal import format_size

PURPOSES = {
    "tokenizer": (
        "gives BEiT v2 pretraining its targets: --tokenizer_model NAME --tokenizer_weight NAME; usage of "
        "the codebook"
    ),
    "tokenizer-v1": "gives BEiT v1 pretraining its targets: --tokenizer_model dall-e --tokenizer_weight NAME",
    "pretrained": "without labels: to fine-tune (--finetune NAME), probe, or pretrain on (--resume NAME)",
    "intermediate": "fine-tuned on ImageNet-21k's 21,841 classes: to fine-tune on (--finetune NAME)",
    "finetuned": (
        "ImageNet-1k classifiers; accuracies in percent: to use or evaluate (--eval --finetune NAME)"
    ),
    "segmentation": "ADE20K's 150 classes; mIoU in percent",
}


def format_table() -> str:
    """The published weights by purpose: name, millions of parameters, about how large
    the download is, size on this machine's disk, published results.
    """
    lines = []
    for kind, purpose in PURPOSES.items():
        lines += [
            f"{kind}: {purpose}",
            f"  {'name':44}{'params':>8}{'download':>11}{'cached':>10}  published",
        ]
        for name, entry in ENTRIES.items():
            if entry.kind == kind:
                params = f"{entry.params:.1f} M" if entry.params else "-"
                download = f"~{format_size(entry.params * 1e6 * 4)}" if entry.params else "-"  # of fp32
                published = ", ".join(f"{metric} {value:g}" for metric, value in entry.metrics.items())
                cached = _format_cached_size(entry)
                lines.append(f"  {name:44}{params:>8}{download:>11}{cached:>10}  {published or '-'}")
        lines.append("")
    return "\n".join([*lines, f"Downloads go to {get_cache_folder()}; TORCH_HOME moves it."])


def _format_cached_size(entry: PublishedFile) -> str:
    path = get_cache_folder() / entry.name
    return format_size(path.stat().st_size) if path.is_file() else "-"


def get_parser() -> ArgumentParser:
    parser = ArgumentParser(description="List the published weights, or download some of them.")
    parser.add_argument("names", nargs="*", metavar="NAME", help="weights to download; none: print the table")
    return parser


@report_user_errors
def main(argv: Sequence[str] | None = None) -> None:
    names = get_parser().parse_args(argv).names
    for name in names:
        pick(ENTRIES, name, "weights")
    for name in names:
        print(fetch(name))
    if not names:
        print(format_table())


if __name__ == "__main__":
    main()
