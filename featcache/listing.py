"""The elements of one data file or folder, whatever it is.

A folder is what it holds: a saved Hugging Face dataset; WebDataset tars (img2dataset's output, with
the parquet file beside each tar that says which downloads failed); images, with the text files
beside them (img2dataset's `files` format); or parquet files with a column of images.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from featcache.bucket_data import list_bucket
from featcache.containers import kind_of, open_dataset, open_parquet, tar_members
from featcache.entries import Element, Unusable, text_entries
from featcache.errors import DamagedFileError, ImageError, ManifestError
from featcache.images import read_bytes
from featcache.object_path import ObjectPath, StorePath
from featcache.parquets import failed_downloads
from featcache.samples import (
    IMAGE_SUFFIXES,
    TEXT_SUFFIXES,
    group,
    is_image,
    sample_element,
    texts_of,
)
from featcache.saved_datasets import splits_of
from featcache.tars import COMPRESSED_SUFFIXES, Member, refuse_compressed

T = TypeVar("T")


def list_elements(path: StorePath, root: StorePath) -> Iterator[tuple[str, Any]]:
    """(place in the data, element) of a data file or a folder: see featcache/entries.py.

    path: exists. root: the image root.
    Raises ManifestError where it cannot be read; FeatcacheError where a library is missing.
    """
    if isinstance(path, ObjectPath):
        yield from list_bucket(path, root)
        return
    try:
        if path.is_dir():
            yield from _folder(path, root)
            return
        kind = kind_of(path)
        if kind == "tar":
            yield from _tar(path, root)
        elif kind == "parquet":
            yield from _parquet(path, root)
        else:
            yield from text_entries(path)
    except OSError as error:
        raise ManifestError(f"{error.filename or path}: {error.strerror}") from None


def _tar(path: Path, root: StorePath) -> Iterator[tuple[str, Element]]:
    prefix = f"{_key_of(path, root)}/"
    with path.open("rb", buffering=0) as file:
        members: dict[str, Member] = {}
        for member in tar_members(path):
            if not member.problem:
                members[member.name] = member
            elif is_image(member.name):
                yield f"{prefix}{member.name}", Unusable(member.problem)

        def read(name: str) -> bytes:
            return os.pread(file.fileno(), members[name].size, members[name].offset)

        for sample, files in group(members):
            images = [f"{prefix}{name}" for name in files if is_image(name)]
            if images:
                place = f"{prefix}{sample}"
                yield place, sample_element(place, images, texts_of(files), read)


def _parquet(path: Path, root: StorePath) -> Iterator[tuple[str, Element]]:
    file = open_parquet(path)
    if file.columns is None:
        raise ManifestError(
            f"{path} has no column of images (neither a Hugging Face Image feature, nor binary "
            "values under a name such as image or jpg)"
        )
    yield from _rows(file.elements(_key_of(path, root)), path)


def _rows(elements: Iterable[Element], path: Path) -> Iterator[tuple[str, Element]]:
    for row, element in enumerate(elements):
        yield f"{path.name}[{row}]", element


def _folder(path: Path, root: StorePath) -> Iterator[tuple[str, Element]]:
    splits = splits_of(path)
    for split in splits:
        dataset = open_dataset(split)
        if dataset.columns is None:
            raise ManifestError(f"{split} is a dataset without a column of images")
        yield from _rows(dataset.elements(_key_of(split, root)), split)
    if splits:
        return
    found = _files(path)
    images = [name for name in found if is_image(name)]
    tars = [name for name in found if name.endswith(".tar")]
    if images and tars:
        raise ManifestError(
            f"{path} holds both image files (first: {images[0]}) and tars (first: {tars[0]}); name "
            f"the ones that are meant, e.g. --data '{path}/*.tar' for the tars"
        )
    compressed = [name for name in found if name.endswith(COMPRESSED_SUFFIXES)]
    if compressed and not images:
        refuse_compressed(path / compressed[0])
    parquets = [path / name for name in found if name.endswith(".parquet")]
    yield from _each([path / name for name in tars], lambda file: _tar(file, root))
    base = _key_of(path, root)
    for name in images:
        yield _image(path, name, name if base == "." else f"{base}/{name}", found)
    if images or tars:
        for file in parquets:
            # img2dataset's metadata of a shard lie beside it, be it a tar or a folder.
            if file.with_suffix(".tar").is_file() or file.with_suffix("").is_dir():
                for row, why in failed_downloads(file):
                    yield f"{file.name}[{row}]", Unusable(why)
        return
    with_images = list(_each(parquets, lambda file: [file] * bool(open_parquet(file).columns)))
    if not with_images:
        raise ManifestError(
            f"{path} holds no image files ({', '.join(sorted(IMAGE_SUFFIXES))}), no tars and no "
            "parquet files with a column of images"
        )
    yield from _each(with_images, lambda file: _parquet(file, root))


def _each(files: Iterable[Path], read: Callable[[Path], Iterable[T]]) -> Iterator[T]:
    """What is read of all files that are whole. Raises DamagedFileError that names all others, at
    the end."""
    damaged: list[DamagedFileError] = []
    for file in files:
        if not file.is_file():  # a pipe would be waited for
            raise ManifestError(f"{file} is no regular file, or a link that leads nowhere")
        try:
            yield from read(file)
        except DamagedFileError as error:
            damaged.append(error)
    if damaged:
        raise DamagedFileError("; ".join(map(str, damaged)))


def _image(path: Path, name: str, key: str, found: dict[str, None]) -> tuple[str, Element]:
    """An image file, with what the files of the same name but for the suffix say."""
    stem = name.removesuffix(Path(name).suffix)
    texts = {suffix: stem + suffix for suffix in TEXT_SUFFIXES if stem + suffix in found}
    place = str(path / name)
    try:
        return place, sample_element(key, [key], texts, lambda text: read_bytes(path / text))
    except ImageError as error:
        return place, Unusable(f"a file beside it is {error.reason}")


def _files(path: Path) -> dict[str, None]:
    """All files below a folder, sorted, as paths relative to it; symbolic links followed, each
    folder visited once. Raises ManifestError where one cannot be read."""

    def fail(error: OSError) -> None:
        raise ManifestError(f"{error.filename}: {error.strerror}; check its permissions")

    found: list[str] = []
    visited: set[tuple[int, int]] = set()
    for folder, folders, names in os.walk(path, followlinks=True, onerror=fail):
        identity = Path(folder).stat()
        if (identity.st_dev, identity.st_ino) in visited:
            folders.clear()
            continue
        visited.add((identity.st_dev, identity.st_ino))
        base = Path(folder).relative_to(path)
        found += [(base / name).as_posix() for name in names]
    return dict.fromkeys(sorted(found))


def _key_of(path: Path, root: StorePath) -> str:
    """Raises ManifestError where it does not lie below the image root."""
    if isinstance(root, ObjectPath):
        raise ManifestError(f"{path} is on a disk, the image root {root} is not; check --images")
    base = os.path.relpath(path, root)
    if base == os.pardir or base.startswith(os.pardir + os.sep):
        raise ManifestError(
            f"{path} lies outside of the image root {root}; name a folder above both with --images"
        )
    return Path(base).as_posix()
