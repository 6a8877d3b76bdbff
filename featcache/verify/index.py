"""The compiled index, and files that are no part of a store."""

from __future__ import annotations

import functools
import os
from pathlib import Path

from featcache import layout
from featcache.codecs import get_codec
from featcache.extract import metadata
from featcache.files import PARTIAL
from featcache.index import build_arrays
from featcache.journal import Commit, Journal, num_rows
from featcache.layout import StoreInfo, array_checksum, array_files, copy_path, map_array
from featcache.verify.report import RECOMPILE, Inspection


def check_index(found: Inspection, info: StoreInfo) -> None:
    """The compiled index against the journal; against its own checksums where that is damaged."""
    if info.index is None:
        return
    expected = {path: sum for path, sum in info.checksums.items() if path.startswith("index/")}
    if found.index_known:
        journal = Journal.gather(found.finished, functools.partial(Commit.load_record, found.root))
        arrays = build_arrays(info, journal)
        said, expected = (
            expected,
            {f"{info.index}/{path}": array_checksum(values) for path, values in arrays.items()},
        )
        for path in expected:
            if said.get(path) != expected[path]:
                found.add(path, "does not say what the journal says", RECOMPILE)
    known = {problem.where for problem in found.problems}
    for path, checksum in expected.items():
        if path in known:
            continue
        try:
            map_array(found.root / path, checksum)
        except ValueError as error:
            found.add(path, str(error), RECOMPILE)


def note_leftovers(found: Inspection, info: StoreInfo) -> None:
    """Files that are no part of the store: nothing reads them."""
    root = found.root
    known = {"zarr.json", copy_path("zarr.json"), "journal/lock", layout.WRITERS}
    codec = get_codec(info.codec)
    known |= set(metadata(info, codec, num_rows(found.plans)))
    if codec.scaled:
        for layer in info.layers:
            for path in (layout.channels_path(layer), copy_path(layout.channels_path(layer))):
                known |= {str(file) for file in array_files(Path(path), 2)}
    for plan in found.plans:
        name = layout.plan_path(plan.generation)
        known |= {name, copy_path(name)}
        for shard in plan.shards:
            known |= {layout.commit_path(shard), layout.pooled_path(shard)}
            for layer in info.layers:
                known |= {layout.shard_path(layer, shard), layout.scales_path(layer, shard)}
    old: set[str] = set()
    for folder, _, names in os.walk(root):
        for name in names:
            path = str((Path(folder) / name).relative_to(root))
            if name.startswith(PARTIAL):
                found.notes.append(f"{path} was left by a stopped run; the next run removes it")
            elif path.startswith("index/"):
                parts = path.split("/")
                if len(parts) > 2 and "/".join(parts[:2]) != info.index:
                    old.add("/".join(parts[:2]))
            elif path not in known and not path.startswith(layout.JOBS):
                found.notes.append(f"{path} is no part of the store")
    found.notes += [f"{name} is an old index; the next run removes it" for name in sorted(old)]
