"""The two forms that a store is kept in: a folder of Zarr arrays, or one HDF5 file.

A form says where the parts of a store lie. What they mean, and how rows are read, is the same for
both: featcache/store.py and featcache/reader.py know no difference.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np

from featcache import layout
from featcache.errors import CorruptStoreError, IncompleteStoreError
from featcache.journal import Commit, Journal, Plan
from featcache.layout import Placement, StoreInfo, read_array
from featcache.object_path import ObjectPath, StorePath
from featcache.tier import Tier, default_tier
from featcache.writer import ShardSpec, zarr_placement


class StoreForm(ABC):
    """Where the parts of the finished store at `path` lie.

    Arrays are named alike in both forms: "features/-2", "index/00000001/status".

    one_file: whether it is a file, written once; else a folder, which can be extended and mended.
    """

    path: StorePath
    one_file: ClassVar[bool]

    @abstractmethod
    def load_info(self) -> StoreInfo:
        """Raises StoreError, IncompleteStoreError, CorruptStoreError."""

    @abstractmethod
    def array(self, name: str, checksum: str) -> np.ndarray[Any, Any]:
        """A small array, mapped read-only after its `array_checksum` was compared.

        Raises CorruptStoreError.
        """

    @abstractmethod
    def placement(self, spec: ShardSpec, name: str) -> Placement:
        """Where the rows of features, scales or pooled outputs lie. Raises CorruptStoreError."""

    @abstractmethod
    def plan(self, generation: int) -> tuple[Plan, bytes]:
        """A plan, and the bytes of its file. Raises CorruptStoreError where they were changed."""

    @abstractmethod
    def commit(self, shard: int) -> Commit:
        """A shard's commit record. Raises CorruptStoreError where it is gone or was changed."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Of all its files."""

    @property
    @abstractmethod
    def cure(self) -> str:
        """What mends damage, for messages."""


class ZarrForm(StoreForm):
    """A folder: featcache/layout.py."""

    one_file = False

    def __init__(self, path: StorePath, tier: Callable[[], Tier] = default_tier) -> None:
        """tier: keeps copies of the arrays of a store in a bucket."""
        self.path = path
        self._tier = tier

    def load_info(self) -> StoreInfo:
        info = StoreInfo.load(self.path)
        if info.index is None:
            journal = Journal.load(self.path, info.generation)
            planned = journal.num_shards
            raise IncompleteStoreError(
                f"{self.path} is not finished: {planned - len(journal.pending)} of {planned} "
                "shards are there; run the same `featcache extract` command again to finish it"
            )
        return info

    def array(self, name: str, checksum: str) -> np.ndarray[Any, Any]:
        if isinstance(self.path, ObjectPath):
            return self._tier().array(self.path, name, checksum)
        return read_array(self.path, name, checksum)

    def placement(self, spec: ShardSpec, name: str) -> Placement:
        return zarr_placement(self.path, spec, name)

    def plan(self, generation: int) -> tuple[Plan, bytes]:
        path = self.path / layout.plan_path(generation)
        return Plan.load(path), path.read_bytes()

    def commit(self, shard: int) -> Commit:
        commit = Commit.load_record(self.path, shard)
        if commit is None:
            raise CorruptStoreError(
                f"{self.path / layout.commit_path(shard)} is gone or was changed; {self.cure}"
            )
        return commit

    @property
    def nbytes(self) -> int:
        if isinstance(self.path, ObjectPath):
            return sum(nbytes for _, nbytes in self.path.listing())
        return sum(path.stat().st_size for path in self.path.rglob("*") if path.is_file())

    @property
    def cure(self) -> str:
        return layout.repair_cure(self.path)
