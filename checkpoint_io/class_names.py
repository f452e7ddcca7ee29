"""Names of a classifier's classes, as users give them."""

from __future__ import annotations

import json
from pathlib import Path

from data_pipeline.imagenet_classes import synsets
from errors import UserError


def read_class_names(given: str | None, count: int) -> list[str] | None:
    """The names that `class_names` gives, as many as the classifier has classes."""
    if given is None:
        return None
    if not count:
        raise UserError("`class_names`: the checkpoint holds no classifier to name the classes of")
    if given == "imagenet-1k":
        names = synsets()
    else:
        try:
            text = Path(given).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(
                f"`class_names` {given}: cannot be read ({error}); give imagenet-1k or a text file"
            ) from None
        try:
            content = json.loads(text)
            pairs = (
                sorted(content.items(), key=lambda pair: int(pair[0]))
                if isinstance(content, dict)
                else enumerate(content)
            )
            names = [str(name) for _, name in pairs]
        except (ValueError, TypeError, RecursionError):
            names = [line.strip() for line in text.splitlines() if line.strip()]
    if len(names) != count:
        raise UserError(f"`class_names` {given} has {len(names)} names, the classifier {count} classes")
    return names
