"""The same images in every kind of input."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

HF_IMAGE = pa.struct({"bytes": pa.binary(), "path": pa.string()})
"""How Hugging Face's `Image` feature is stored."""


def write_tar(path: Path, members: Iterable[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def samples(images: Path, names: Iterable[str]) -> list[tuple[str, bytes]]:
    """Members of a WebDataset tar as img2dataset writes it: an image, its caption, its metadata."""
    found = []
    for i, name in enumerate(names):
        stem = Path(name).stem
        metadata = {"caption": f"image {i}", "status": "success", "key": stem}
        found += [
            (name, (images / name).read_bytes()),
            (f"{stem}.txt", f"image {i}".encode()),
            (f"{stem}.json", json.dumps(metadata).encode()),
        ]
    return found


def write_parquet(path: Path, columns: Mapping[str, Any], group_rows: int = 3) -> Path:
    pq.write_table(pa.table(dict(columns)), path, row_group_size=group_rows)
    return path


def hf_images(images: Path, names: Iterable[str | None]) -> pa.Array:
    """A column of `Image`s; null where there is no name."""
    values = [name and {"bytes": (images / name).read_bytes(), "path": name} for name in names]
    return pa.array(values, HF_IMAGE)
