"""Commit records and data files.

Letters: S images of a shard, P patches, C codes of a patch.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash

from featcache import layout
from featcache.files import Seal
from featcache.journal import Commit, Plan, num_rows
from featcache.layout import Status, StoreInfo
from featcache.store import blank_spec
from featcache.verify.files import missing
from featcache.verify.report import RESHARD, Inspection, OnProgress, Problem, VerifyProgress
from featcache.writer import ShardSpec

BLOCK_BYTES = 1 << 21
"""Read at once; a block is worked on while it is still in the processor's cache."""


def check_shards(
    found: Inspection,
    info: StoreInfo,
    workers: int,
    on_progress: OnProgress,
    only: frozenset[int] | None,
) -> None:
    """Commit records and data files."""
    spec = blank_spec(info)
    status = found.status = np.full(num_rows(found.plans), Status.UNUSED, np.uint8)
    jobs = [(plan, shard) for plan in found.plans for shard in plan.shards]
    read = [only is None or shard in only for _, shard in jobs]
    sizes = [
        spec.bytes_of(len(plan.digests_of(shard))) * wanted
        for (plan, shard), wanted in zip(jobs, read, strict=True)
    ]
    total, done = sum(sizes), 0
    checker = _ShardChecker(found.root, spec, found.plans)
    found.index_known = found.plans_whole and bool(info.index)
    on_progress(VerifyProgress("verify", 0, total))
    with ThreadPoolExecutor(workers, thread_name_prefix="featcache-verify") as pool:
        results = pool.map(checker.check, [shard for _, shard in jobs], read)
        for (plan, shard), size, result in zip(jobs, sizes, results, strict=True):
            done += size
            on_progress(VerifyProgress("verify", done, total))
            finished = plan.generation <= info.generation
            if result is None and not finished:
                found.unfinished += 1
                continue
            if result is None:
                path = layout.commit_path(shard)
                result = _ShardResult(None, [Problem(path, "is missing", RESHARD, shard)])
            found.problems += result.problems
            found.nbytes += result.nbytes
            if result.problems:
                found.shards[shard] = plan
            if result.status is None:
                found.index_known = found.index_known and not finished
                continue
            here = status[shard * plan.shard_images : plan.end_row][: plan.shard_images]
            here[:] = result.status[: len(here)]
    found.images = int((status == Status.OK).sum())


@dataclass(slots=True)
class _ShardResult:
    """status: uint8[S], None where the commit record is lost. nbytes: of the data files read."""

    status: np.ndarray[Any, Any] | None
    problems: list[Problem]
    nbytes: int = 0


class _ShardChecker:
    """Checks shards, on any number of threads."""

    def __init__(self, root: Path, spec: ShardSpec, plans: Sequence[Plan]) -> None:
        self._root = root
        self._spec = spec
        self._plans = plans
        self._local = threading.local()

    def check(self, shard: int, read: bool) -> _ShardResult | None:
        """One shard; only its commit record unless `read`. None where it has none."""
        path = layout.commit_path(shard)
        try:
            commit = Commit.load_record(self._root, shard)
        except OSError as error:
            return _ShardResult(None, [Problem(path, missing(error), RESHARD, shard)])
        if commit is None:
            if not (self._root / path).exists():
                return None
            return _ShardResult(None, [Problem(path, "is damaged", RESHARD, shard)])
        status = np.array([row.status for row in commit.rows], np.uint8)
        result = _ShardResult(status, [])
        if not read:
            return result
        result.nbytes = sum(seal.nbytes for seal in commit.files.values())
        for name in self._spec.layers:
            self._check_layer(name, commit, status == Status.OK, result.problems)
        if self._spec.pooled_dtype is not None:
            self._check_pooled(commit, status == Status.OK, result.problems)
        return result

    def _check_layer(
        self, name: str, commit: Commit, ok: np.ndarray[Any, Any], problems: list[Problem]
    ) -> None:
        """Features file and patch scales of one layer."""
        layer, shard = self._spec.layers[name], commit.shard
        found: dict[str, str] = {}
        scales = None
        if layer.codec.scaled:
            path = layout.scales_path(name, shard)
            values = np.zeros((self._spec.images, layer.num_patches), "<f4")
            scales = torch.from_numpy(values)
            if what := self._read_small(path, commit.files.get(path), values):
                found[path] = what
        path = layout.shard_path(name, shard)
        what, finite = self._stream(path, commit.files.get(path), name, ok, scales)
        if what:
            found[path] = what
        bad = self._bad_slots(name, commit, scales) if found else []
        for path, what in found.items():
            beside = "" if bad else "; every row is whole"
            problems.append(self._problem(path, what + beside, shard, bad))
        infinite = [slot for slot in np.flatnonzero(ok & ~finite).tolist() if slot not in bad]
        if infinite:
            what = "values that are not finite were stored"
            problems.append(self._problem(layout.shard_path(name, shard), what, shard, infinite))

    def _stream(
        self,
        path: str,
        seal: Seal | None,
        name: str,
        ok: np.ndarray[Any, Any],
        scales: torch.Tensor | None,
    ) -> tuple[str, np.ndarray[Any, Any]]:
        """A features file in one pass. Returns what is wrong with it, empty where nothing is, and
        bool[S]: the rows whose values are finite (what could not be read counts as that)."""
        layer, geometry = self._spec.layers[name], self._spec.geometry(name)
        pitch, used = geometry.pitch_bytes, int(ok.nonzero()[0].max()) + 1 if ok.any() else 0
        finite = np.ones(len(ok), np.bool_)
        block = self._block(max(1, BLOCK_BYTES // pitch) * pitch)
        rows = len(block) // pitch
        tensor = torch.frombuffer(block, dtype=torch.uint8).view(rows, pitch)
        codes = tensor[:, : layer.code_bytes].view(layer.codec.dtype)
        codes = codes.view(rows, *layer.code_shape)
        checksum, nbytes = xxhash.xxh3_64(), 0
        try:
            with (self._root / path).open("rb", buffering=0) as file:
                for first in range(0, used, rows):
                    count = min(rows, used - first)
                    view = memoryview(block)[: count * pitch]
                    got = _read_into(file.fileno(), view)
                    checksum.update(view[:got])
                    nbytes += got
                    if got < len(view):
                        break
                    of_scales = None if scales is None else scales[first : first + count]
                    is_finite = layer.codec.is_finite(codes[:count], of_scales)
                    finite[first : first + count] = is_finite.numpy()
                tail = b""
                while got := _read_into(file.fileno(), memoryview(block)):
                    checksum.update(memoryview(block)[:got])
                    nbytes += got
                    tail = (tail + bytes(block[:got]))[-geometry.index_bytes :]
        except OSError as error:
            return missing(error), finite
        if what := _differs(seal, nbytes, checksum):
            return what, finite
        if tail != geometry.encode_index(ok):
            return "its shard index does not fit the statuses of its rows", finite
        return "", finite

    def _check_pooled(
        self, commit: Commit, ok: np.ndarray[Any, Any], problems: list[Problem]
    ) -> None:
        spec, path = self._spec, layout.pooled_path(commit.shard)
        assert spec.pooled_dtype is not None
        pooled = torch.zeros(spec.images, spec.pooled_width, dtype=spec.pooled_dtype)
        raw = pooled.view(torch.uint8).numpy()
        if what := self._read_small(path, commit.files.get(path), raw):
            bad = [
                slot
                for slot in np.flatnonzero(ok).tolist()
                if xxhash.xxh3_64_intdigest(raw[slot].data)
                != commit.rows[slot].checksums.get("pooled")
            ]
            beside = "" if bad else "; every row is whole"
            problems.append(self._problem(path, what + beside, commit.shard, bad))
            return
        infinite = np.flatnonzero(ok & ~pooled.isfinite().all(1).numpy()).tolist()
        if infinite:
            what = "values that are not finite were stored"
            problems.append(self._problem(path, what, commit.shard, infinite))

    def _read_small(self, path: str, seal: Seal | None, values: np.ndarray[Any, Any]) -> str:
        """Fill an array from a file of its size. Returns what is wrong with the file."""
        flat = values.reshape(-1).view(np.uint8)
        checksum = xxhash.xxh3_64()
        try:
            with (self._root / path).open("rb", buffering=0) as file:
                nbytes = _read_into(file.fileno(), flat.data)
                checksum.update(flat[:nbytes].data)
                rest = bytearray(4096)
                while got := _read_into(file.fileno(), memoryview(rest)):
                    checksum.update(memoryview(rest)[:got])
                    nbytes += got
        except OSError as error:
            return missing(error)
        return _differs(seal, nbytes, checksum)

    def _bad_slots(self, name: str, commit: Commit, scales: torch.Tensor | None) -> list[int]:
        """The slots whose stored bytes are not the ones that were written."""
        geometry, bad = self._spec.geometry(name), []
        codes = memoryview(bytearray(geometry.chunk_bytes))
        try:
            descriptor = os.open(
                self._root / layout.shard_path(name, commit.shard), os.O_RDONLY | os.O_CLOEXEC
            )
        except OSError:
            return [slot for slot, row in enumerate(commit.rows) if row.status == Status.OK]
        try:
            for slot, row in enumerate(commit.rows):
                if row.status != Status.OK:
                    continue
                try:
                    os.lseek(descriptor, slot * geometry.pitch_bytes, os.SEEK_SET)
                    got = _read_into(descriptor, codes)
                except OSError:
                    got = 0
                checksum = xxhash.xxh3_64(codes[:got])
                if scales is not None:
                    checksum.update(scales[slot].numpy().data)
                if got < len(codes) or checksum.intdigest() != row.checksums.get(name):
                    bad.append(slot)
        finally:
            os.close(descriptor)
        return bad

    def _problem(self, path: str, what: str, shard: int, slots: Sequence[int]) -> Problem:
        rows = [shard * self._spec.images + slot for slot in slots]
        return Problem.of_rows(path, what, RESHARD, shard, rows, self._plans)

    def _block(self, nbytes: int) -> bytearray:
        """This thread's buffer."""
        block: bytearray | None = getattr(self._local, "block", None)
        if block is None or len(block) != nbytes:
            block = self._local.block = bytearray(nbytes)
        return block


def _read_into(descriptor: int, view: memoryview) -> int:
    """As many bytes as there are, up to the view's length. Raises OSError."""
    count = 0
    while count < len(view) and (got := os.readv(descriptor, [view[count:]])):
        count += got
    return count


def _differs(seal: Seal | None, nbytes: int, checksum: xxhash.xxh3_64) -> str:
    """What distinguishes a file from what its commit record says of it."""
    if seal is None:
        return "its commit record does not know it"
    if nbytes != seal.nbytes:
        return f"has {nbytes:,} bytes instead of {seal.nbytes:,}"
    if checksum.hexdigest() != seal.xxh3_64:
        return "is not what was written (its checksum differs)"
    return ""
