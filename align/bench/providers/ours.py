"""featcache's own reader over its own store."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from align.bench.providers.base import STORE, Data, Features, Reader, Rows
from featcache.store import Store


class Stream(Reader):
    """`reader.stream`: read ahead in the background, into reused buffers."""

    def __init__(self, path: Path, data: Data, **options: Any) -> None:
        super().__init__(path, data)
        self.reader = Store(path / STORE).reader(**options)

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
