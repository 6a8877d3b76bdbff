"""Images inside of a dataset that `datasets.Dataset.save_to_disk` wrote, read in place.

`datasets` maps its Arrow files into memory and knows about its shards, and rows that were selected
or shuffled, so it reads them; what a row holds is decided as for parquet.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from featcache.columns import element_of, find_columns, image_bytes, needs_data_extra, row_of
from featcache.entries import Element
from featcache.errors import DamagedFileError, ImageError

STATE = "state.json"
"""In the folder of every saved dataset."""
SPLITS = "dataset_dict.json"
"""In the folder of a saved DatasetDict, whose splits are folders."""


def is_saved_dataset(path: Path) -> bool:
    return (path / STATE).is_file() and (path / "dataset_info.json").is_file()


def splits_of(path: Path) -> list[Path]:
    """The datasets in a folder: itself, those of a DatasetDict by name, or none."""
    if is_saved_dataset(path):
        return [path]
    if not (path / SPLITS).is_file():
        return []
    return sorted(each for each in path.iterdir() if is_saved_dataset(each))


class SavedDataset:
    """The image column of one saved dataset."""

    nbytes = 1 << 20
    """That it takes in memory, about; the images are mapped."""

    def __init__(self, path: Path) -> None:
        """Raises DamagedFileError where it is damaged, FeatcacheError without `datasets`."""
        self._path = path
        try:
            import datasets
        except ImportError:
            raise needs_data_extra(f"reading the dataset {path}", "datasets") from None
        shown = not datasets.are_progress_bars_disabled()
        datasets.disable_progress_bars()  # it shows one where there are more than 16 files
        try:
            dataset = datasets.load_from_disk(str(path))
        # Its readers raise what they run into, from KeyError to pyarrow's own.
        except Exception as error:
            why = " ".join(str(error).split())[:200] or type(error).__name__
            raise DamagedFileError(f"{path} is a damaged dataset: {why}; save it again") from None
        finally:
            if shown:
                datasets.enable_progress_bars()
        self.columns = find_columns(dataset.data.schema, str(path))
        self._rows = dataset.with_format("arrow")

    @property
    def num_rows(self) -> int:
        return len(self._rows)

    def elements(self, name: str) -> Iterator[Element]:
        """What each row says, without reading image bytes (see `columns.element_of`)."""
        assert self.columns is not None
        small = self._rows.select_columns([*self.columns.small, self.columns.image])
        for start in range(0, self.num_rows, 256):
            table = small[start : start + 256]
            images = table.column(self.columns.image)
            texts = table.select(list(self.columns.small)).to_pylist()
            for i in range(table.num_rows):
                cell = images[i]
                if self.columns.many:
                    there: Any = None if not cell.is_valid else [None] * len(cell)
                else:
                    there = cell.is_valid or None
                row = {**(texts[i] if texts else {}), self.columns.image: there}
                yield element_of(row, self.columns, f"{name}/{start + i}")

    def read(self, member: str) -> bytes:
        """The bytes of a row's image. Raises ImageError, "missing"."""
        if self.columns is None:
            raise ImageError("missing", f"{self._path} has no column of images")
        row = row_of(member, self.num_rows, str(self._path))
        table = self._rows[row : row + 1]
        value = table.column(self.columns.image)[0].as_py()
        return image_bytes(value, self.columns, member, f"{self._path}/{row}")
