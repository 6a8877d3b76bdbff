"""Images inside of parquet files, read in place.

Parquet is read by row group: the image column of the latest ones is kept, `ROW_GROUPS_BYTES` in all
or two of any size. Rows in the order of the file, as extraction asks for them, read each row group
once; a row group of many gigabytes takes as much memory.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from featcache.columns import (
    element_of,
    find_columns,
    image_bytes,
    needs_data_extra,
    row_of,
)
from featcache.entries import Element
from featcache.errors import DamagedFileError, ImageError
from featcache.once import OnceCache

if TYPE_CHECKING:
    import pyarrow as pa

MAGIC = b"PAR1"
ROW_GROUPS_BYTES = 128 << 20
"""Of row groups that one process keeps, or two of any size: at the border between two, threads are
in both."""
BATCH_ROWS = 64
"""Images that are decoded into one Arrow array, so that none comes near Arrow's 2 GiB."""


class ParquetImages:
    """The image column of one parquet file, opened anew for each row group: nothing stays open."""

    def __init__(self, path: Path) -> None:
        """Raises DamagedFileError where the file is damaged, FeatcacheError without pyarrow."""
        self._path, self._number = path, next(_numbers)
        file = _open(path)
        self._metadata = file.metadata
        schema = file.schema_arrow
        self.columns = find_columns(schema, str(path))
        groups = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
        self._ends = list(itertools.accumulate(groups))
        self._leaves = [file.schema.column(i).path for i in range(len(file.schema))]
        file.close()

    @property
    def nbytes(self) -> int:
        """That it takes in memory."""
        return int(self._metadata.serialized_size)

    @property
    def num_rows(self) -> int:
        return self._ends[-1] if self._ends else 0

    def elements(self, name: str) -> Iterator[Element]:
        """What each row says, without reading image bytes (see `columns.element_of`).

        name: the file's key. Raises DamagedFileError.
        """
        assert self.columns is not None
        wanted = [*self.columns.small, *self._leaf("path")]
        known = 0
        for batch in _batches(self._path, self._metadata, wanted):
            for values in batch.to_pylist():
                yield element_of(values, self.columns, f"{name}/{known}")
                known += 1
        for row in range(known, self.num_rows):  # not one small column: the rows' number is known
            yield element_of({}, self.columns, f"{name}/{row}")

    def read(self, member: str) -> bytes:
        """The bytes of a row's image. Raises ImageError: "missing", "unreadable"."""
        if self.columns is None:
            raise ImageError("missing", f"{self._path} has no column of images")
        row = row_of(member, self.num_rows, str(self._path))
        group = bisect.bisect_right(self._ends, row)
        first = self._ends[group - 1] if group else 0
        arrays, ends = self._row_group(group)
        at = row - first
        array = bisect.bisect_right(ends, at)
        start = ends[array - 1] if array else 0
        value = arrays[array][at - start].as_py()
        return image_bytes(value, self.columns, member, f"{self._path}/{row}")

    def _row_group(self, group: int) -> tuple[list[pa.Array], list[int]]:
        """The image column of a row group, in several arrays, and where each of them ends."""
        columns = self.columns
        assert columns is not None
        wanted = self._leaf("bytes") or [columns.image]

        def load() -> tuple[list[pa.Array], list[int]]:
            try:
                batches = list(_batches(self._path, self._metadata, wanted, group))
            except DamagedFileError as error:
                raise ImageError("unreadable", str(error)) from None
            return (
                [batch.column(0) for batch in batches],
                list(itertools.accumulate(batch.num_rows for batch in batches)),
            )

        return _row_groups.get((self._number, group), load)

    def _leaf(self, name: str) -> list[str]:
        """The full name of the image struct's `name` within the file; none for plain binary."""
        assert self.columns is not None
        if not self.columns.struct:
            return []
        prefix = f"{self.columns.image}."
        suffix = f".{name}"
        return [x for x in self._leaves if x.startswith(prefix) and x.endswith(suffix)][:1]


def failed_downloads(path: Path) -> Iterator[tuple[int, str]]:
    """(row, why) of those that img2dataset could not get, as its metadata of one shard say; none
    where the file is something else. Raises DamagedFileError."""
    file = _open(path)
    if not {"status", "key"} <= set(file.schema_arrow.names):
        return
    row = 0
    for batch in _batches(path, file.metadata, ["status"]):
        for status in batch.column(0).to_pylist():
            if status != "success":
                yield row, f"img2dataset could not get it: {status}"
            row += 1


def _open(path: Path, metadata: Any = None) -> Any:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise needs_data_extra(f"reading {path}", "pyarrow") from None
    try:
        return pq.ParquetFile(path, metadata=metadata, memory_map=False)
    except (OSError, pa.ArrowException) as error:
        raise _damaged(path, error) from None


def _batches(
    path: Path, metadata: Any, columns: list[str], group: int | None = None
) -> Iterator[pa.RecordBatch]:
    """Of one row group, or of all. Raises DamagedFileError."""
    if not columns:
        return
    import pyarrow as pa

    with _open(path, metadata) as file:
        try:
            yield from file.iter_batches(
                batch_size=BATCH_ROWS if group is not None else 1024,
                row_groups=None if group is None else [group],
                columns=columns,
                use_threads=False,
            )
        except (OSError, pa.ArrowException) as error:
            raise _damaged(path, error) from None


def _damaged(path: Path, error: Exception) -> DamagedFileError:
    why = " ".join(str(error).split())[:200]
    return DamagedFileError(
        f"{path} is no parquet file, or damaged: {why}; fetch it again, or leave it out of --data"
    )


def _nbytes(group: tuple[list[pa.Array], list[int]]) -> int:
    return sum(array.nbytes for array in group[0])


_numbers = itertools.count()
_row_groups: OnceCache[tuple[int, int], tuple[list[Any], list[int]]] = OnceCache(
    ROW_GROUPS_BYTES, _nbytes, least=2
)
