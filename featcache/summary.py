"""What a store holds and takes, finished or not, without reading its features."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import featcache
from featcache import layout
from featcache.errors import IncompleteStoreError
from featcache.gc import unreferenced
from featcache.journal import Journal, merge
from featcache.layout import Status, StoreInfo
from featcache.object_path import ObjectPath, StorePath
from featcache.store import Store, blank_spec

PARTS = ("features", "scales", "pooled", "index", "journal")


@dataclass(frozen=True, slots=True)
class Summary:
    """finished: whether it can be opened. info: its description.

    rows: of its arrays; images: of them with features; pending: of them still to be encoded.
    failures: {reason: image keys}. dropped: rows freed by `featcache gc`; unreferenced: rows that
    it would free, of together `unreferenced_bytes`.
    generations: extractions that added something. committed, planned: shards; None for a store of
    another format than ours.
    bits: a stored value of a layer, patch scales included. image_bytes: of one image's features,
    in all layers, with scales and pooled output.
    nbytes, parts: on disk, holes not counted; {part of the store: bytes}.
    """

    finished: bool
    info: StoreInfo
    rows: int
    images: int
    pending: int
    failures: dict[str, int]
    dropped: int
    unreferenced: int
    unreferenced_bytes: int
    generations: int
    committed: int
    planned: int
    bits: float
    image_bytes: int
    nbytes: int
    parts: dict[str, int]

    @property
    def fingerprint(self) -> dict[str, Any]:
        """How the features were made; the storage codec is part of it."""
        return {**self.info.fingerprint, "codec": self.info.codec}


def summarize(path: StorePath) -> Summary:
    """Raises StoreError where `path` is no store, CorruptStoreError."""
    try:
        store = featcache.open(path)
    except IncompleteStoreError:
        return _of_journal(path)
    return _of_index(store)


def _of_index(store: Store) -> Summary:
    info, index, path = store.info, store.index, store.path
    committed = planned = -(-store.num_rows // info.shard_images)
    generations, pending = info.generation, 0
    if isinstance(path, ObjectPath) or path.is_dir():
        committed = len(list((path / "journal").glob("commit-*.json")))
        if (path / layout.plan_path(generations + 1)).exists():
            # An extraction has begun since.
            journal = Journal.load(path)
            planned = journal.num_shards
            committed = planned - len(journal.pending)
            generations = len(journal.plans)
            pending = _pending(journal)
    return _summary(
        path,
        info,
        finished=True,
        rows=store.num_rows,
        images=store.num_images,
        pending=pending,
        failures=dict(Counter(failure.reason for failure in store.failures())),
        dropped=int((index.status == Status.DROPPED).sum()),
        unreferenced=int(index.unreferenced().sum()),
        generations=generations,
        committed=committed,
        planned=planned,
    )


def _of_journal(path: StorePath) -> Summary:
    info = StoreInfo.load(path)
    journal = Journal.load(path, info.generation)
    known = merge(journal.plans)
    meant = np.fromiter(known.rows.values(), np.int64)
    states = journal.status[meant[meant >= 0]]
    failures = Counter(failure.reason for failure in known.missing.values())
    failures.update(
        Status(state).reason
        for state in states.tolist()
        if state not in (Status.OK, Status.UNUSED, Status.DROPPED)
    )
    return _summary(
        path,
        info,
        finished=False,
        rows=len(journal.status),
        images=int((journal.status == Status.OK).sum()),
        pending=_pending(journal),
        failures=dict(failures),
        dropped=int((journal.status == Status.DROPPED).sum()),
        unreferenced=int(unreferenced(journal).sum()),
        generations=len(journal.plans),
        committed=journal.num_shards - len(journal.pending),
        planned=journal.num_shards,
    )


def _pending(journal: Journal) -> int:
    return sum(len(plan.digests_of(shard)) for plan, shard in journal.pending)


def _summary(path: StorePath, info: StoreInfo, **counts: Any) -> Summary:
    spec = blank_spec(info)
    of_layers = spec.image_bytes - spec.pooled_bytes
    place = sum(spec.geometry(layer).pitch_bytes for layer in info.layers)
    parts = disk_parts(path)
    return Summary(
        info=info,
        bits=8 * of_layers / (len(info.layers) * info.num_patches * info.width),
        image_bytes=spec.image_bytes,
        unreferenced_bytes=counts["unreferenced"] * place,
        nbytes=sum(parts.values()),
        parts=parts,
        **counts,
    )


def disk_parts(path: StorePath) -> dict[str, int]:
    """{part: bytes on disk} of a store's folder, or of the one file that it is."""
    parts = dict.fromkeys((*PARTS, "other"), 0)
    if isinstance(path, ObjectPath):
        for name, nbytes in path.listing():
            first = name.partition("/")[0]
            parts[first if first in PARTS else "other"] += nbytes
        return {part: nbytes for part, nbytes in parts.items() if nbytes}
    if path.is_file():
        return {"file": _bytes(path.stat())}
    for folder, _, names in os.walk(path):
        inside = Path(folder).relative_to(path).parts
        part = inside[0] if inside and inside[0] in PARTS else "other"
        for name in names:
            try:
                parts[part] += _bytes((Path(folder) / name).stat())
            except FileNotFoundError:  # a running extraction has renamed it
                continue
    return {part: nbytes for part, nbytes in parts.items() if nbytes}


def _bytes(status: os.stat_result) -> int:
    return min(status.st_size, status.st_blocks * 512)
