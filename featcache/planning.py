"""Which images go into which rows, decided before any work and never changed afterwards."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from featcache.errors import ImageError, StoreError
from featcache.images import digest
from featcache.journal import Failure, Journal, Plan, image_roots, merge
from featcache.layout import Status
from featcache.object_path import READS_AT_ONCE, is_url
from featcache.sources import ImageRef
from featcache.tiles import Tiling, tile_digest

SCAN_BLOCK = 1024
"""Files that are queued for hashing at once."""
RETRIED = (Status.CHANGED, Status.MISSING, Status.UNREADABLE)
"""Failures of the file rather than of the image: the next extraction tries these again."""
WITHOUT_ANSWER = (*RETRIED, Status.DROPPED)
"""Rows that an image cannot be given again: neither features nor a lasting reason."""


def plan_extraction(
    journal: Journal,
    keys: Sequence[str],
    image_root: str,
    shard_images: int,
    batch_size: int,
    workers: int,
    on_scan: Callable[[int], None],
    tiling: Tiling | None = None,
) -> Plan | None:
    """The next generation of work, or None where the earlier plans already cover the data.

    Every image file is read and hashed: its digest is its identity, so an image that is already
    planned under any key is not planned again, and one whose bytes changed gets a new row; so does
    one whose row was dropped.
    New rows start at a new shard, in the order of `keys`, each image's tiles right after it.
    Raises StoreError where known keys mean other images because the image root is another folder,
    rather than the same one moved: there, most known keys still mean the same images.
    """
    plans = journal.plans
    row_of_digest: dict[bytes, int] = {}
    for plan in plans:
        for row, image in enumerate(plan.new_digests, plan.first_row):
            if journal.status[row] not in WITHOUT_ANSWER:
                row_of_digest[image] = row
    known, roots = merge(plans), image_roots(plans)
    first_shard = max((plan.first_shard + plan.num_shards for plan in plans), default=0)
    next_row = first_shard * shard_images

    now: dict[str, int] = {}
    failures: list[Failure] = []
    new: list[bytes] = []
    replaced: list[str] = []
    moved = 0
    for key, outcome in _scan(keys, image_root, workers, on_scan, tiling):
        before = known.rows.get(key, -1)
        cached = before >= 0 and journal.status[before] not in RETRIED
        elsewhere = cached and roots[key] != image_root
        if isinstance(outcome, Failure):
            # What is already cached stays valid when its image file goes away.
            if not cached and known.missing.get(key) != outcome:
                now[key] = -1
                failures.append(outcome)
            continue
        if outcome not in row_of_digest:
            row_of_digest[outcome] = next_row + len(new)
            new.append(outcome)
        if row_of_digest[outcome] != before:
            now[key] = row_of_digest[outcome]
            if elsewhere:
                replaced.append(key)
        elif elsewhere:
            moved += 1
    if len(replaced) > moved:
        raise StoreError(
            f"{len(replaced):,} image keys of the store, first {replaced[0]!r}, are other pictures "
            f"in {image_root} than in {roots[replaced[0]]}; extract into another --out"
        )
    if not now:
        return None
    return Plan(
        generation=plans[-1].generation + 1 if plans else 1,
        first_shard=first_shard,
        shard_images=shard_images,
        batch_size=batch_size,
        image_root=image_root,
        keys=list(now),
        rows=np.fromiter(now.values(), np.int64, len(now)),
        missing=failures,
        new_digests=new,
    )


def _scan(
    keys: Sequence[str],
    image_root: str,
    workers: int,
    on_scan: Callable[[int], None],
    tiling: Tiling | None,
) -> Iterator[tuple[str, bytes | Failure]]:
    """Each key with its file's digest, or why it has none; and the keys of its tiles with theirs.

    on_scan: is told how many of `keys` are done.
    """

    def scan(key: str) -> list[tuple[str, bytes | Failure]]:
        try:
            data = ImageRef(image_root, key).read()
        except ImageError as error:
            return [(key, Failure(key, error.reason, error.detail))]
        image = digest(data)
        tiles = tiling.keys_in(key, data) if tiling else []
        return [(key, image), *((tile, tile_digest(image, tile)) for tile in tiles)]

    # A bucket's answers are waited for, not worked for.
    threads = max(workers, READS_AT_ONCE) if is_url(image_root) else workers
    with ThreadPoolExecutor(threads, thread_name_prefix="featcache-scan") as pool:
        for start in range(0, len(keys), SCAN_BLOCK):
            block = keys[start : start + SCAN_BLOCK]
            for found in pool.map(scan, block):
                yield from found
            on_scan(start + len(block))
