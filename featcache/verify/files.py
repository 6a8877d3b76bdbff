"""A store's description, plans and channel values, each with its second copy."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path
from typing import Any

import numpy as np

from featcache import layout
from featcache.codecs import get_codec
from featcache.errors import CorruptStoreError
from featcache.files import read_json, render_json, with_checksum
from featcache.journal import Plan
from featcache.layout import (
    FORMAT_VERSION,
    StoreInfo,
    array_files,
    copy_path,
    map_array,
    render_array,
)
from featcache.verify.report import COPY, REMEASURE, REWRITE, Inspection


def check_content(found: Inspection, path: str, content: bytes, cure: str) -> None:
    """A file whose every byte is known."""
    try:
        there = (found.root / path).read_bytes()
    except OSError as error:
        what = missing(error)
    else:
        if there == content:
            return
        what = "is not what was written"
    found.add(path, what, cure)
    found.contents[path] = content


def missing(error: OSError) -> str:
    gone = isinstance(error, FileNotFoundError | NotADirectoryError)
    return "is missing" if gone else f"cannot be read ({error.strerror})"


def _read_description(path: Path) -> tuple[StoreInfo | None, Any]:
    """What a zarr.json says where it matches its checksum, else None; and its format version."""
    try:
        attributes = read_json(path)["attributes"]["featcache"]
        version = attributes.get("format_version")
        if with_checksum(attributes) != attributes:
            return None, None
        if version != FORMAT_VERSION:
            return None, version
        del attributes["checksum"]
        return StoreInfo(**attributes), version
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None, None


def check_root(found: Inspection) -> None:
    """zarr.json and its second copy: either tells what the other should be."""
    name, copy = "zarr.json", copy_path("zarr.json")
    original, version = _read_description(found.root / name)
    if original is None and version is not None:
        StoreInfo.load(found.root)  # a whole description of another format; raises
    second, _ = _read_description(found.root / copy)
    # Where both are whole, the original is the one that is written first.
    info = found.info = original or second
    if info is None:
        with contextlib.suppress(CorruptStoreError, OSError):
            StoreInfo.load(found.root)  # raises where it says that it is of another format
        for path in (name, copy):
            gone = "is missing" if not (found.root / path).exists() else "is damaged"
            other = copy if path == name else name
            found.add(
                path,
                f"{gone}, as is {other}: nothing else says what the store is; extract into "
                "another one",
            )
        return
    content = render_json(info.document())
    check_content(found, name, content, COPY if original is None else REWRITE)
    check_content(found, copy, content, COPY)


def check_plans(found: Inspection) -> None:
    """Every plan and its second copy."""
    assert found.info is not None
    root = found.root
    folders = (root / "journal", root / copy_path(""))
    numbers = [
        int(match[1])
        for folder in folders
        for path in folder.glob("plan-*.npz")
        if (match := re.fullmatch(r"plan-(\d{8})\.npz", path.name))
    ]
    next_shard = 0
    for number in range(1, max([found.info.generation, *numbers]) + 1):
        name = layout.plan_path(number)
        whole: dict[str, Plan] = {}
        for path in (name, copy_path(name)):
            try:
                plan = Plan.load(root / path)
            except CorruptStoreError:
                continue
            placed = (plan.generation, plan.first_shard, plan.shard_images)
            if placed == (number, next_shard, found.info.shard_images):
                whole[path] = plan
        if not whole:
            found.plans_whole = False
            gone = "is damaged" if (root / name).exists() else "is missing"
            found.add(
                name,
                f"{gone}, and so is its second copy: which images its rows are cannot be told any "
                "more; extract into another store",
            )
            return
        good = next(iter(whole))
        content = (root / good).read_bytes()
        for path in (name, copy_path(name)):
            check_content(found, path, content, COPY)
        found.plans.append(whole[good])
        next_shard += whole[good].num_shards


def check_channels(found: Inspection, info: StoreInfo) -> None:
    """The static channel values of a scaled codec, and their second copies."""
    if not get_codec(info.codec).scaled:
        return
    for layer in info.layers:
        name = layout.channels_path(layer)
        if name not in info.checksums:  # no image has been encoded
            continue
        damage: dict[str, str] = {}
        good = None
        for path in (name, copy_path(name)):
            try:
                good = np.array(map_array(found.root / path, info.checksums[name]))
            except ValueError as error:
                damage[path] = str(error)
        for path, what in damage.items():
            if good is None:
                found.add(path, f"{what}, and so is the other copy of it", REMEASURE)
                found.channels[layer] = None
                continue
            found.add(path, what, COPY)
            places = array_files(Path(path), good.ndim)
            for place, content in zip(places, render_array(good), strict=True):
                found.contents[str(place)] = bytes(content)
