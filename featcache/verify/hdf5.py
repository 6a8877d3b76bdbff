"""A store in one HDF5 file: every row, plan and record is compared; nothing in it can be mended."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from featcache import layout
from featcache.errors import CorruptStoreError, StoreError
from featcache.layout import Status
from featcache.store import Store
from featcache.verify.report import Inspection, OnProgress, Problem, VerifyProgress
from featcache.writer import ShardBuffer


def inspect_hdf5(path: Path, on_progress: OnProgress) -> Inspection:
    """Look at the file's structure, description, index, plans, commit records and rows.

    Raises StoreError for a file without features, and one of a newer format.
    """
    found = Inspection(path)
    try:
        store = Store(path)
        found.info, found.plans = store.info, store.plans
        buffer = ShardBuffer(store.spec)
        placement = partial(store.form.placement, store.spec)
        placement(layout.features_path(store.layers[0]))
    except CorruptStoreError as error:
        found.add(path.name, str(error))
        return found
    found.status = store.index.status
    jobs = [(plan, shard) for plan in store.plans for shard in plan.shards]
    total = store.num_rows * store.spec.image_bytes
    for plan, shard in jobs:
        on_progress(VerifyProgress("verify", found.nbytes, total))
        first = shard * plan.shard_images
        where = f"shard {shard}"
        found.nbytes += len(plan.digests_of(shard)) * store.spec.image_bytes
        try:
            commit = store.form.commit(shard)
            store.require_indexed(commit)
            bad = buffer.load_from(placement, shard, commit.rows)
        except StoreError as error:
            found.add(where, str(error), shard=shard)
            continue
        found.images += sum(row.status == Status.OK for row in commit.rows) - len(bad)
        if bad:
            rows = [first + slot for slot in bad]
            what = "values are not what was written"
            found.problems.append(Problem.of_rows(where, what, "", shard, rows, store.plans))
    on_progress(VerifyProgress("verify", total, total))
    return found
