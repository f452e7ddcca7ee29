"""The questions: which runs are compared, by which figure; and the order of the grid."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from evidence.photos import CLASSIFIED
from evidence.recipes import Recipes
from evidence.runs import Run

SEEDS = (0, 1, 2, 3, 4)
FINETUNED, KNN, PROBE, MIOU = "test_acc1", "test_knn_acc1", "test_acc1_last_layer", "test_miou"
MEASURES = {
    FINETUNED: "",
    MIOU: "mIoU",
    KNN: "k-NN",
    PROBE: "linear",
    "train_codes_used": "codes used",
    "train_perplexity": "perplexity",
}
ACCURACIES = (FINETUNED, KNN, PROBE, MIOU)


@dataclass(frozen=True)
class Row:
    """Two kinds of run, and a figure of both."""

    first: str
    second: str
    measure: str
    runs: Callable[[Recipes], tuple[Run, Run]]
    paper: str = ""  # where a paper says that the first is better, and its figures

    @property
    def should_be_high(self) -> bool:
        return self.measure in ACCURACIES

    @property
    def decides(self) -> bool:
        """Whether it is in the short table."""
        return self.measure in (FINETUNED, PROBE, MIOU)

    @property
    def label(self) -> str:
        measure = MEASURES[self.measure]
        return f"{self.first} − {self.second}" + (f", {measure}" if measure else "")


@dataclass(frozen=True)
class Question:
    name: str
    title: str
    rows: tuple[Row, ...]
    tier: int  # those of the lowest are run first
    photos: tuple[str, ...] = CLASSIFIED

    def runs(self, recipes: Recipes) -> list[Run]:
        return [run for row in self.rows for run in row.runs(recipes)]


def pretrainings(first: str, second: str, one: str, other: str, paper: str = "") -> tuple[Row, ...]:
    """Two variants: fine-tuned with all labels, and by k-NN."""
    return (
        Row(first, second, FINETUNED, lambda r: (r.finetuning(one), r.finetuning(other)), paper),
        Row(first, second, KNN, lambda r: (r.pretraining(one), r.pretraining(other))),
    )


def tokenizers(first: str, second: str, one: str, other: str) -> tuple[Row, ...]:
    """Two tokenizers: their codes, and what pretraining with them gives."""
    codes = tuple(
        Row(first, second, measure, lambda r: (r.tokenizer(one), r.tokenizer(other)))
        for measure in ("train_codes_used", "train_perplexity")
    )
    return (*codes, *pretrainings(first, second, one, other))


def labels(percent: int, times: int) -> Row:
    return Row(
        f"{percent}% of labels: pretrained",
        "scratch" if times == 1 else f"{times} x scratch",
        FINETUNED,
        lambda r: (r.finetuning("base", percent), r.finetuning(None, percent, times)),
        "BEiT: 83.2, 81.8 (DeiT)" if (percent, times) == (100, 1) else "",
    )


def probes(features: str, title: str) -> Row:
    return Row(
        f"CLS head{title}",
        "none",
        PROBE,
        lambda r: (r.linear("base", features), r.linear("no-cls-head", features)),
        "BEiT v2: the head is ahead" if features == "cls" else "",
    )


QUESTIONS = {
    question.name: question
    for question in (
        Question(
            "labels",
            "Is pretraining ahead of random weights?",
            (
                *(labels(percent, times) for percent in (100, 10, 5) for times in (1, 3)),
                Row(
                    "pretrained: layer decay 0.8",
                    "none",
                    FINETUNED,
                    lambda r: (r.finetuning("base"), r.finetuning("base", decay=False)),
                ),
            ),
            1,
        ),
        Question(
            "targets",
            "What should a masked patch predict?",
            (
                *pretrainings("tokens", "pixels", "base", "pixels", "BEiT: 82.9, 81.0"),
                *pretrainings("trained", "untrained tokenizer", "base", "untrained-tokenizer"),
            ),
            1,
        ),
        Question(
            "segmentation",
            "Does pretraining help to segment, with few masks?",
            (
                Row(
                    "assay: pretrained",
                    "scratch",
                    MIOU,
                    lambda r: (r.segmentation("base"), r.segmentation(None)),
                ),
            ),
            2,
            ("assay",),
        ),
        Question(
            "masks",
            "Blocks or single patches?",
            pretrainings("blocks", "patches", "base", "random-masks", "BEiT: 82.9, 82.8"),
            2,
        ),
        Question(
            "loss",
            "Masked patches or all?",
            pretrainings("masked patches", "all patches", "base", "all-patches", "BEiT: 82.9, 82.6"),
            2,
        ),
        Question(
            "cls",
            "Does the CLS head help?",
            (
                probes("cls", ""),
                probes("mean", " (mean of patches)"),
                *pretrainings("CLS head", "none", "base", "no-cls-head"),
            ),
            2,
        ),
        Question(
            "teacher",
            "Which teacher?",
            (
                *pretrainings("CNN", "HOG", "base", "teacher-hog"),
                *pretrainings("CNN", "random CNN", "base", "teacher-random"),
            ),
            3,
        ),
        Question(
            "codebook",
            "How many codes, of which dimension?",
            tuple(
                row
                for first, second, variant in (
                    ("256", "64 codes", "codes-64"),
                    ("256", "1024 codes", "codes-1024"),
                    ("dimension 16", "8", "dim-8"),
                    ("dimension 16", "32", "dim-32"),
                )
                for row in pretrainings(first, second, "base", variant)
            ),
            4,
        ),
        Question(
            "codes",
            "Do k-means warm-up and revival of codes help?",
            tuple(
                row
                for second, variant in (
                    ("no warm-up", "no-kmeans"),
                    ("no revival", "no-revival"),
                    ("neither", "neither"),
                )
                for row in tokenizers("both", second, "base", variant)
            ),
            3,
        ),
        Question(
            "continued",
            "Start pretraining from other photos' weights?",
            pretrainings("other photos' weights", "random", "continued", "base"),
            3,
        ),
        Question(
            "crops",
            "Do kept crops (`--crop_cycle`) cost accuracy?",
            tuple(
                row
                for count in ("1", "4")
                for row in pretrainings(f"{count} kept crops", "new ones", f"crops-{count}", "base")
            ),
            4,
        ),
    )
}


# what --quick runs again: a part of the first question, of one set of photos and two seeds
QUICK = Question("quick", "", tuple(labels(percent, 1) for percent in (100, 10, 5)), 1, ("tiles",))
QUICK_SEEDS = (0, 1)


def list_runs(names: Iterable[str], photos: Sequence[str], seeds: Sequence[int]) -> list[Run]:
    """Those of the questions, the most important first: by tier, then seed, then set."""
    chosen = [QUESTIONS[name] for name in names]
    return [
        run
        for tier in sorted({question.tier for question in chosen})
        for seed in seeds
        for name in photos
        for question in chosen
        if question.tier == tier and name in question.photos
        for run in question.runs(Recipes(name, seed))
    ]
