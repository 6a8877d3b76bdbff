"""Which images go into which rows, decided before any work and never changed afterwards."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from featcache.errors import ConfigError, ImageError
from featcache.images import digest, read_bytes
from featcache.index import Failure, Plan
from featcache.layout import Status

SCAN_REPORT_EVERY = 256
RETRIED = (Status.CHANGED, Status.MISSING, Status.UNREADABLE)
"""Failures of the file rather than of the image: the next extraction tries these again."""


def plan_extraction(
    plans: Sequence[Plan],
    status: np.ndarray[Any, Any],
    keys: Sequence[str],
    image_root: Path,
    shard_images: int,
    workers: int,
    on_scan: Callable[[int], None],
) -> Plan | None:
    """The next generation of work, or None where the earlier plans already cover the data.

    Every image file is read and hashed: its digest is its identity, so an image that is already
    planned under any key is not planned again, and one whose bytes changed gets a new row.
    New rows start at a new shard, in the order of `keys`.
    plans: the store's, oldest first. status: uint8[rows] of the compiled index, empty without one.
    """
    for plan in plans:
        if plan.shard_images != shard_images:
            raise ConfigError(
                f"the store has {plan.shard_images} images a shard, not {shard_images}; leave "
                "--shard-images out"
            )
    row_of_digest: dict[bytes, int] = {}
    for plan in plans:
        for row, image in enumerate(plan.new_digests, plan.first_row):
            if row >= len(status) or status[row] not in RETRIED:
                row_of_digest[image] = row
    last = plans[-1] if plans else None
    row_of_key: dict[str, int] = (
        dict(zip(last.keys, last.rows.tolist(), strict=True)) if last else {}
    )
    before = dict(row_of_key)
    failures = {failure.key: failure for failure in last.missing} if last else {}
    failures_before = dict(failures)

    first_shard = max((plan.first_shard + plan.num_shards for plan in plans), default=0)
    next_row = first_shard * shard_images
    new: list[bytes] = []
    for key, outcome in _scan(keys, image_root, workers, on_scan):
        if isinstance(outcome, ImageError):
            # What is already cached stays valid when its image file goes away.
            if row_of_key.setdefault(key, -1) < 0:
                failures[key] = Failure(key, outcome.reason, outcome.detail)
            continue
        failures.pop(key, None)
        if outcome not in row_of_digest:
            row_of_digest[outcome] = next_row + len(new)
            new.append(outcome)
        row_of_key[key] = row_of_digest[outcome]
    if last and row_of_key == before and failures == failures_before and not new:
        return None
    return Plan(
        generation=last.generation + 1 if last else 1,
        first_shard=first_shard,
        shard_images=shard_images,
        keys=list(row_of_key),
        rows=np.fromiter(row_of_key.values(), np.int64, len(row_of_key)),
        new_digests=new,
        missing=list(failures.values()),
    )


def _scan(
    keys: Sequence[str], image_root: Path, workers: int, on_scan: Callable[[int], None]
) -> list[tuple[str, bytes | ImageError]]:
    """Each key with its file's digest, or why it has none."""

    def scan(key: str) -> bytes | ImageError:
        try:
            return digest(read_bytes(image_root / key))
        except ImageError as error:
            return error

    found: list[tuple[str, bytes | ImageError]] = []
    with ThreadPoolExecutor(workers, thread_name_prefix="featcache-scan") as pool:
        for key, outcome in zip(keys, pool.map(scan, keys), strict=True):
            found.append((key, outcome))
            if len(found) % SCAN_REPORT_EVERY == 0:
                on_scan(len(found))
    on_scan(len(found))
    return found
