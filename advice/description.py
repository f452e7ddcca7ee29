"""What advise.py says of a folder, in sentences."""

from __future__ import annotations

from advice.inspection import FolderReport
from data_pipeline.folders import shorten_list
from errors import count, printable


def describe(folder: FolderReport) -> list[str]:
    """What is in the folder, and what is wrong with it."""
    sides = (
        f"{folder.short_side} pixels"
        if folder.smallest == folder.largest
        else (f"{folder.smallest} to {folder.largest} pixels, half of them up to {folder.short_side}")
    )
    kind = (
        "8-bit " + ("gray" if folder.is_gray else "color")
        if folder.is_rgb8
        else f"{count(folder.in_chans, 'channel')} of {folder.dtype}"
    )
    held_out = f", {folder.held_out:,} in val/" if folder.has_splits else ""
    lines = [
        f"folder     {folder.root}: {count(folder.images, 'image')} to train on{held_out}",
        f"images     {kind}; shorter side {sides}",
        f"labels     {describe_labels(folder)}",
    ]
    looked_at = count(folder.looked_at, "file")
    if folder.unreadable:
        number, first = len(folder.unreadable), folder.unreadable[0]
        lines.append(f"warning    {number:,} of {looked_at} could not be read, such as {first}")
    if folder.of_other_kinds:
        lines.append(
            f"warning    {folder.of_other_kinds:,} of {looked_at} have other channels or numbers than the "
            "rest: training reads all of them as the rest, or leaves them out"
        )
    if folder.in_chans > folder.short_side:
        lines.append(
            f"warning    images of {folder.in_chans} channels and {folder.short_side} pixels: arrays are "
            "read as (height, width, channels); transpose them if they are not"
        )
    if folder.copies:
        copies = (
            "1 file is a copy of another" if folder.copies == 1 else f"{folder.copies:,} files are copies"
        )
        lines.append(f"warning    {copies}: what it shows is learned twice")
    if folder.copies_across:
        images = (
            "1 image of val/ is"
            if folder.copies_across == 1
            else f"{folder.copies_across:,} images of val/ are"
        )
        lines.append(f"warning    {images} in train/ too: accuracies will come out too high")
    if folder.near_constant:
        lines.append(
            f"warning    {folder.near_constant:,} of {looked_at} show next to nothing: their pixels are "
            "nearly all equal"
        )
    return [printable(line) for line in lines]


def describe_labels(folder: FolderReport) -> str:
    sizes = sorted(folder.classes.values())
    if not sizes:
        lies = "1 image lies" if folder.loose == 1 else f"{folder.loose:,} images lie"
        return f"none, as {lies} beside the folders that could be classes" if folder.loose else "none"
    of = f"{sizes[0]:,} to " if sizes[0] < sizes[-1] else ""
    return f"{len(sizes)} classes of {of}{count(sizes[-1], 'image')}: {shorten_list(list(folder.classes))}"
