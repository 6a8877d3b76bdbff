"""Filling one shard in memory and publishing it: data files by rename, the commit record last.

A shard has one writer. Its files and its commit record appear whole or not at all; a shard
without a commit record does not exist for anyone, and the next run writes it anew.

Letters: P patches, D encoder width.
"""

from __future__ import annotations

import contextlib
import errno
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import xxhash
from torch import Tensor

from featcache import layout
from featcache.codecs import LayerCodec, StoredFeatures
from featcache.errors import StoreError
from featcache.files import Seal, publish, seal_of_parts, sync
from featcache.fingerprint import versions
from featcache.journal import Commit, RowRecord
from featcache.layout import Placement, ShardGeometry, Status
from featcache.object_path import ObjectPath, StorePath


@dataclass(frozen=True, slots=True)
class ShardSpec:
    """What every shard of a store is made of.

    images: rows a shard. layers: how each stored layer is coded. pooled_dtype: of the encoder's
    pooled output, None where it has none. pooled_width: D.
    """

    images: int
    layers: Mapping[str, LayerCodec]
    pooled_dtype: torch.dtype | None
    pooled_width: int

    def geometry(self, layer: str) -> ShardGeometry:
        """Of the layer's features file."""
        return ShardGeometry(self.images, self.layers[layer].code_bytes)

    @property
    def shard_bytes(self) -> int:
        """Of a full shard's data files together, and of the buffer that it is filled in."""
        return self.bytes_of(self.images)

    @property
    def image_bytes(self) -> int:
        """Of one image's codes, patch scales and pooled output, without padding."""
        of_layers = sum(layer.code_bytes + layer.scale_bytes for layer in self.layers.values())
        return of_layers + self.pooled_bytes

    @property
    def pooled_bytes(self) -> int:
        """Of one image's pooled output; 0 where there is none."""
        return self.pooled_width * self.pooled_dtype.itemsize if self.pooled_dtype else 0

    def bytes_of(self, images: int) -> int:
        """Of the data files of a shard whose first `images` rows have features."""
        of_layers = sum(
            images * self.geometry(name).pitch_bytes
            + self.geometry(name).index_bytes
            + self.images * layer.scale_bytes
            for name, layer in self.layers.items()
        )
        return of_layers + self.images * self.pooled_bytes


class ShardBuffer:
    """One shard of every layer in memory, at the offsets that it has on disk; reused.

    RAM: `ShardSpec.shard_bytes`.
    """

    def __init__(self, spec: ShardSpec) -> None:
        self.spec = spec
        self._codes = {
            name: np.zeros((spec.images, spec.geometry(name).pitch_bytes), np.uint8)
            for name in spec.layers
        }
        self._scales = {
            name: np.zeros((spec.images, layer.num_patches), np.float32)
            for name, layer in spec.layers.items()
            if layer.codec.scaled
        }
        self._pooled: Tensor | None = None
        if spec.pooled_dtype is not None:
            self._pooled = torch.zeros(spec.images, spec.pooled_width, dtype=spec.pooled_dtype)
        self.clear(0)

    def clear(self, shard: int) -> None:
        """Begin shard number `shard`; its rows are UNUSED until set."""
        self.shard = shard
        self.rows = [RowRecord() for _ in range(self.spec.images)]
        self.seconds: dict[str, float] = {}

    def set(
        self,
        slot: int,
        features: Mapping[str, StoredFeatures],
        pooled: Tensor | None,
        size: tuple[int, int],
        grid: tuple[int, int] | None = None,
    ) -> None:
        """Put one image in place. features: {layer: batch of this one image, on the CPU};
        pooled: pooled_dtype[D]; size, grid: see `RowRecord`."""
        checksums = {}
        for name, stored in features.items():
            codes = raw_bytes(stored.codes)
            self._codes[name][slot, : len(codes)] = codes
            checksum = xxhash.xxh3_64(codes)
            if stored.scales is not None:
                scales = stored.scales[0].numpy()
                self._scales[name][slot] = scales
                checksum.update(scales.data)
            checksums[name] = checksum.intdigest()
        if pooled is not None:
            assert self._pooled is not None
            self._pooled[slot] = pooled
            checksums["pooled"] = xxhash.xxh3_64_intdigest(raw_bytes(pooled))
        self.rows[slot] = RowRecord(Status.OK, "", size, checksums, grid)

    def fail(self, slot: int, status: Status, detail: str, size: tuple[int, int] = (0, 0)) -> None:
        """Enter the row in the ledger; it gets no chunk and reads as NaN."""
        self.rows[slot] = RowRecord(status, detail, size)

    def get(self, slot: int) -> tuple[dict[str, StoredFeatures], Tensor | None]:
        """One image as `set` takes it; views of the buffer."""
        features = {}
        for name, layer in self.spec.layers.items():
            codes = torch.from_numpy(self._codes[name][slot, : layer.code_bytes])
            scales = self._scales.get(name)
            features[name] = StoredFeatures(
                codes.view(layer.codec.dtype).view(1, *layer.code_shape),
                None if scales is None else torch.from_numpy(scales[slot : slot + 1]),
                layer,
            )
        return features, None if self._pooled is None else self._pooled[slot]

    def load(self, root: StorePath, shard: int, rows: list[RowRecord]) -> list[int]:
        """`load_from` of a Zarr store."""
        return self.load_from(lambda array: zarr_placement(root, self.spec, array), shard, rows)

    def load_from(
        self, placement: Callable[[str], Placement], shard: int, rows: Sequence[RowRecord]
    ) -> list[int]:
        """Fill it with what is stored of a shard; returns the slots whose stored bytes are not the
        ones that were written, or not finite.

        placement: where the rows of an array lie, by its name ("features/-2"). rows: what the
        shard's commit record says of them; only those with features are read.
        Files that are missing or short count as damaged where they end.
        """
        self.clear(shard)
        self.rows = list(rows)
        for array, values in self._arrays():
            _fill(placement(array), shard * self.spec.images, self._present(), values)
        return [
            slot
            for slot, row in enumerate(rows)
            if row.status == Status.OK and not self._is_whole(slot, row.checksums)
        ]

    def _is_whole(self, slot: int, checksums: Mapping[str, int]) -> bool:
        features, pooled = self.get(slot)
        for name, stored in features.items():
            checksum = xxhash.xxh3_64(raw_bytes(stored.codes))
            if stored.scales is not None:
                checksum.update(stored.scales.numpy().data)
            finite = stored.layer.codec.is_finite(stored.codes, stored.scales)
            if checksum.intdigest() != checksums.get(name) or not bool(finite):
                return False
        if pooled is None:
            return True
        checksum = xxhash.xxh3_64(raw_bytes(pooled))
        return checksum.intdigest() == checksums.get("pooled") and bool(pooled.isfinite().all())

    def publish(self, root: StorePath) -> Commit:
        """Write the shard's files, then its commit record, unless the shard is there by now.

        Raises StoreError when the disk is full or the store cannot be written; what was
        committed before stays valid.
        """
        start = time.perf_counter()
        try:
            # A record left from before, whose files were damaged, must not vouch for the new ones.
            # One that was not there is never removed: it is another worker's, who was quicker.
            record = root / layout.commit_path(self.shard)
            if record.exists():
                if (there := Commit.load(root, self.shard)) is not None:
                    return there
                record.unlink(missing_ok=True)
                if not isinstance(record, ObjectPath):
                    sync(record.parent)
            files = self._write(root, {})
            self.seconds["write"] = time.perf_counter() - start
            commit = Commit(self.shard, self.rows, files, self.seconds, versions())
            commit.save(root)
        except OSError as error:
            raise write_error(root, error) from error
        return commit

    def rewrite(self, root: StorePath, commit: Commit) -> Commit:
        """Write the shard's files as the rows are now, and replace its commit record, which is at
        no time absent; `commit` is the one there, or of the store that the rows come from.

        Every file is at least as long as it says, and by its length it is known to be there:
        whichever files were replaced before a kill, the shard stays whole for everyone.
        Raises StoreError as `publish`.
        """
        try:
            files = self._write(root, commit.files)
            commit = replace(commit, rows=self.rows, files=files)
            commit.save(root)
        except OSError as error:
            raise write_error(root, error) from error
        return commit

    def sealed(self, commit: Commit) -> Commit:
        """What `rewrite` would write as the commit record."""
        files = {path: seal_of_parts(parts) for path, parts in self._files(commit.files)}
        return replace(commit, rows=self.rows, files=files)

    def write_to(self, placement: Callable[[str], tuple[int, Placement]], count: int) -> None:
        """Write the first `count` rows in place into files that are there.

        placement: an open descriptor, and where the rows of an array lie in it, by its name.
        Raises OSError.
        """
        absent = ~self._present()
        self._clear_absent(absent)
        for layer, codes in self._codes.items():
            codes[absent, : self.spec.layers[layer].code_bytes] = self._fill_bytes(layer)
        for array, values in self._arrays():
            descriptor, where = placement(array)
            for slot in range(count):
                at = where.offset(self.shard * self.spec.images + slot)
                write_at(descriptor, values[slot, : where.row_bytes].data, at)

    def _fill_bytes(self, layer: str) -> np.ndarray[Any, Any]:
        """uint8: the codes of a row without features, as other readers should see them."""
        coded = self.spec.layers[layer]
        codec = coded.codec
        fill = float(codec.fill_value)
        codes = torch.full(coded.code_shape, fill, dtype=codec.dtype)
        return codes.flatten().view(torch.uint8).numpy()

    def _arrays(self) -> Iterator[tuple[str, np.ndarray[Any, Any]]]:
        """(name, uint8[images, bytes of a row, with padding]) of every array; views."""
        for layer, codes in self._codes.items():
            yield layout.features_path(layer), codes
        for layer, scales in self._scales.items():
            yield layout.scales_name(layer), scales.view(np.uint8)
        if self._pooled is not None:
            yield "pooled", self._pooled.view(torch.uint8).numpy()

    def _present(self) -> np.ndarray[Any, Any]:
        """bool[images]: which rows have features."""
        return np.array([row.status == Status.OK for row in self.rows])

    def _clear_absent(self, absent: np.ndarray[Any, Any]) -> None:
        for scales in self._scales.values():
            scales[absent] = np.nan
        if self._pooled is not None:
            self._pooled[torch.from_numpy(absent)] = torch.nan

    def _write(self, root: StorePath, before: Mapping[str, Seal]) -> dict[str, Seal]:
        """Publish the data files, none shorter than its seal in `before`. Raises OSError."""
        return {path: publish(root / path, parts) for path, parts in self._files(before)}

    def _files(
        self, before: Mapping[str, Seal]
    ) -> Iterator[tuple[str, list[bytes | memoryview | int]]]:
        """(path, content for `files.publish`) of every data file."""
        present = self._present()
        self._clear_absent(~present)
        for name in self.spec.layers:
            path = layout.shard_path(name, self.shard)
            shortest = before[path].nbytes if path in before else 0
            yield path, self._shard_parts(name, present, shortest)
        for name, scales in self._scales.items():
            yield layout.scales_path(name, self.shard), [scales.data]
        if self._pooled is not None:
            yield layout.pooled_path(self.shard), [raw_bytes(self._pooled)]

    def _shard_parts(
        self, name: str, present: np.ndarray[Any, Any], shortest: int
    ) -> list[bytes | memoryview | int]:
        """A features file: runs of images at their places, holes for those without, the index.

        shortest: its length at the least, in bytes; a hole before the index makes up for it.
        """
        geometry = self.spec.geometry(name)
        codes = self._codes[name]
        parts: list[bytes | memoryview | int] = []
        used = int(present.nonzero()[0].max()) + 1 if present.any() else 0
        first = 0
        while first < used:
            last = first
            while last < used and present[last] == present[first]:
                last += 1
            run = codes[first:last]
            parts.append(run.data if present[first] else run.nbytes)
            first = last
        hole = shortest - used * geometry.pitch_bytes - geometry.index_bytes
        return [*parts, max(0, hole), geometry.encode_index(present)]


def zarr_placement(root: StorePath, spec: ShardSpec, array: str) -> Placement:
    """Where the rows of a Zarr store's array lie, by its name ("features/-2")."""
    kind, _, layer = array.partition("/")
    images, cure = spec.images, layout.repair_cure(root)
    if kind == "features":
        geometry = spec.geometry(layer)
        row_bytes, pitch_bytes = geometry.chunk_bytes, geometry.pitch_bytes
        return Placement(
            lambda shard: root / layout.shard_path(layer, shard),
            images, row_bytes, pitch_bytes, cure,
        )  # fmt: skip
    if kind == "scales":
        row_bytes = spec.layers[layer].scale_bytes
        return Placement(
            lambda shard: root / layout.scales_path(layer, shard),
            images, row_bytes, row_bytes, cure,
        )  # fmt: skip
    row_bytes = spec.pooled_bytes
    return Placement(
        lambda shard: root / layout.pooled_path(shard), images, row_bytes, row_bytes, cure
    )


def _fill(
    where: Placement, first: int, present: np.ndarray[Any, Any], values: np.ndarray[Any, Any]
) -> None:
    """Read the rows that are `present`, counted from row `first`, into values: uint8[images, ...];
    what is not in the file, or not present, is zeros."""
    values[~present] = 0
    values[:, where.row_bytes :] = 0
    path = where.paths(first // where.rows_per_file)
    if isinstance(path, ObjectPath):
        _fill_from(path, where, first, present, values)
        return
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        values[:] = 0
        return
    try:
        for slot in present.nonzero()[0].tolist():
            row, count = values[slot, : where.row_bytes], 0
            with contextlib.suppress(OSError):
                while read := os.preadv(
                    descriptor, [row[count:].data], where.offset(first + slot) + count
                ):
                    count += read
            row[count:] = 0
    finally:
        os.close(descriptor)


def _fill_from(
    path: ObjectPath,
    where: Placement,
    first: int,
    present: np.ndarray[Any, Any],
    values: np.ndarray[Any, Any],
) -> None:
    """`_fill` out of a bucket. RAM: the whole file."""
    try:
        content = np.frombuffer(path.read_bytes(), np.uint8)
    except FileNotFoundError:
        values[:] = 0
        return
    for slot in present.nonzero()[0].tolist():
        row = content[where.offset(first + slot) :][: where.row_bytes]
        values[slot, : len(row)] = row
        values[slot, len(row) :] = 0


def write_at(descriptor: int, content: memoryview, at: int) -> None:
    """Write all of `content` at a place of a file. Raises OSError."""
    while content:
        written = os.pwrite(descriptor, content, at)
        content, at = content[written:], at + written


def raw_bytes(values: Tensor) -> memoryview:
    """A CPU tensor's bytes; no copy where it is contiguous."""
    return values.detach().contiguous().flatten().view(torch.uint8).numpy().data


def write_error(root: StorePath, error: OSError) -> StoreError:
    """The user's line for a store that cannot be written."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return StoreError(
            f"{root}: the disk is full; every committed shard is safe: free some space and run "
            "the same command again"
        )
    return StoreError(f"{root}: cannot write ({error.strerror}); mend that and run again")
