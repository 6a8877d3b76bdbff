"""Filling one shard in memory and publishing it: data files by rename, the commit record last.

A shard has one writer. Its files and its commit record appear whole or not at all; a shard
without a commit record does not exist for anyone, and the next run writes it anew.

Letters: P patches, D encoder width.
"""

from __future__ import annotations

import errno
import time
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from featcache import layout
from featcache.errors import StoreError
from featcache.files import publish, sync
from featcache.fingerprint import versions
from featcache.journal import Commit, RowRecord
from featcache.layout import ShardGeometry, Status


class ShardBuffer:
    """One shard of every layer in memory, at the offsets that it has on disk; reused.

    RAM: layers x images x pitch bytes, plus images x D x itemsize of pooled output.
    """

    def __init__(self, layers: list[str], geometry: ShardGeometry, pooled_bytes: int) -> None:
        """pooled_bytes: bytes of one image's pooled output, 0 where the encoder has none."""
        self.geometry = geometry
        self._chunks = {
            layer: np.zeros((geometry.images, geometry.pitch_bytes), np.uint8) for layer in layers
        }
        self._pooled = np.zeros((geometry.images, pooled_bytes), np.uint8)
        self.clear(0)

    def clear(self, shard: int) -> None:
        """Begin shard number `shard`; its rows are UNUSED until set."""
        self.shard = shard
        self.rows = [RowRecord() for _ in range(self.geometry.images)]
        self.seconds: dict[str, float] = {}

    def set(
        self,
        slot: int,
        features: dict[str, np.ndarray[Any, Any]],
        pooled: np.ndarray[Any, Any] | None,
        size: tuple[int, int],
    ) -> None:
        """Put one image's stored bytes in place. features: {layer: uint8[chunk_bytes]};
        pooled: uint8[pooled_bytes]."""
        checksums = {}
        for layer, values in features.items():
            self._chunks[layer][slot, : self.geometry.chunk_bytes] = values
            checksums[layer] = xxhash.xxh3_64_intdigest(values.data)
        if pooled is not None:
            self._pooled[slot] = pooled
        self.rows[slot] = RowRecord(Status.OK, "", size, checksums)

    def fail(self, slot: int, status: Status, detail: str, size: tuple[int, int] = (0, 0)) -> None:
        """Enter the row in the ledger; it gets no chunk and reads as NaN."""
        self.rows[slot] = RowRecord(status, detail, size)

    def publish(self, root: Path, nan: bytes) -> Commit:
        """Write the shard's files, then its commit record.

        nan: the bytes of one NaN, which rows without features are filled with.
        Raises StoreError when the disk is full or the store cannot be written; what was
        committed before stays valid.
        """
        start = time.perf_counter()
        present = np.array([row.status == Status.OK for row in self.rows])
        files: dict[str, int] = {}
        try:
            # A record left from before, whose files were damaged, must not vouch for the new ones.
            record = root / layout.commit_path(self.shard)
            if record.exists():
                record.unlink()
                sync(record.parent)
            for layer, chunks in self._chunks.items():
                # Nobody reads a hole, and should somebody, it is not zeros.
                chunks[~present] = np.resize(np.frombuffer(nan, np.uint8), chunks.shape[1])
                path = layout.shard_path(layer, self.shard)
                used = int(present.nonzero()[0].max()) + 1 if present.any() else 0
                index = self.geometry.encode_index(present)
                parts: list[bytes | memoryview] = [chunks[:used].data] if used else []
                files[path] = publish(root / path, [*parts, index])
            if self._pooled.size:
                self._pooled[~present] = np.resize(
                    np.frombuffer(nan, np.uint8), self._pooled.shape[1]
                )
                path = layout.pooled_path(self.shard)
                files[path] = publish(root / path, [self._pooled.data])
            self.seconds["write"] = time.perf_counter() - start
            commit = Commit(self.shard, self.rows, files, self.seconds, versions())
            commit.save(root)
        except OSError as error:
            raise write_error(root, error) from error
        return commit


def write_error(root: Path, error: OSError) -> StoreError:
    """The user's line for a store that cannot be written."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return StoreError(
            f"{root}: the disk is full; every committed shard is safe: free some space and run "
            "the same command again"
        )
    return StoreError(f"{root}: cannot write ({error.strerror}); mend that and run again")
