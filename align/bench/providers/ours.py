"""featcache's own reader over its own store."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from align.bench.providers.base import STORE, Data, Features, Reader, Rows, UnavailableError
from featcache.reader import FeatureReader
from featcache.store import Store


def open_reader(store: Store, **options: Any) -> FeatureReader:
    """`store.reader(**options)`. Raises UnavailableError for an option that it does not know: what
    is measured must be what the row says."""
    known = inspect.signature(store.reader).parameters
    if unknown := [name for name in options if name not in known]:
        raise UnavailableError(f"Store.reader has no option {unknown[0]!r}")
    return store.reader(**options)


class Stream(Reader):
    """`reader.stream`: read ahead in the background, into reused buffers."""

    def __init__(self, path: Path, data: Data, **options: Any) -> None:
        super().__init__(path, data)
        self.reader = open_reader(Store(path / STORE), **options)

    def batches(self, batches: Sequence[Rows]) -> Iterator[Features]:
        for stored in self.reader.stream(batches):
            yield stored.codes.numpy()

    def close(self) -> None:
        self.reader.close()


class Read(Stream):
    """`reader.read`: each batch in memory of its own."""

    def batches(self, batches: Sequence[Rows]) -> Iterator[Features]:
        for rows in batches:
            yield self.reader.read(rows).numpy()
