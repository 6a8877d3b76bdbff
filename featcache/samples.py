"""Images and the files beside them that say something about them, as WebDataset groups them.

Files whose paths agree up to the first dot of the last part are one sample: its images are the
files with an image's suffix, its text comes from `.json`, `.txt` or `.caption`. A WebDataset tar
keeps the files of a sample together; img2dataset's `files` format lays the same out as folders.
"""

from __future__ import annotations

import itertools
import json
import posixpath
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from featcache.entries import Element, Unusable, with_text

IMAGE_SUFFIXES = frozenset(
    f".{suffix}"
    for suffix in (
        "apng avif bmp gif jfif jp2 jpeg jpg png ppm tif tiff webp".split()  # noqa: SIM905
    )
)
TEXT_SUFFIXES = (".json", ".txt", ".caption")


def is_image(name: str) -> bool:
    return posixpath.splitext(name)[1].lower() in IMAGE_SUFFIXES


def split_name(name: str) -> tuple[str, str]:
    """ "a/0001.left.jpg" -> ("a/0001", ".left.jpg"): a sample's name, and which file of it.

    A name without a dot, or that begins with one, is of no sample: ("", "").
    """
    folder, last = posixpath.split(name)
    stem, dot, rest = last.partition(".")
    return (posixpath.join(folder, stem), f".{rest}") if stem and dot else ("", "")


def group(names: Iterable[str]) -> Iterator[tuple[str, list[str]]]:
    """(sample, its files) of consecutive names, those that are of no sample left out."""
    for sample, files in itertools.groupby(names, lambda name: split_name(name)[0]):
        if sample:
            yield sample, list(files)


def texts_of(files: Iterable[str]) -> dict[str, str]:
    """{".json", ".txt" or ".caption": the file} of a WebDataset sample's files."""
    by_suffix = {split_name(name)[1].lower(): name for name in files}
    return {suffix: by_suffix[suffix] for suffix in TEXT_SUFFIXES if suffix in by_suffix}


def sample_element(
    identity: str, images: list[str], texts: dict[str, str], read: Callable[[str], bytes]
) -> Element:
    """A sample as an element of a data file, or why it is none.

    identity: unless its .json has an id. images: keys. texts: as `texts_of` gives them.
    read: gives the bytes of a small file; may raise ImageError.
    """
    found: dict[str, Any] = {}
    if ".json" in texts:
        try:
            document = json.loads(read(texts[".json"]))
        except (ValueError, RecursionError):
            return Unusable("its .json is malformed")
        if isinstance(document, dict):  # another one says nothing about a sample
            found = document
        if found.get("status", "success") != "success":
            return Unusable(f"img2dataset could not get it: {found['status']}")
    text = texts.get(".txt") or texts.get(".caption")
    if text is not None and found.get("conversations") is None:
        try:
            found = {**found, "caption": read(text).decode("utf-8-sig")}
        except UnicodeDecodeError:
            return Unusable(f"its {posixpath.splitext(text)[1]} is not UTF-8 text")
    element = {
        "id": identity if found.get("id") is None else found["id"],
        "source": found.get("source"),
        "images": images,
    }
    return with_text(element, found)
