"""Which columns of an Arrow table hold images and texts, found by type and name.

An image column is a Hugging Face `Image` feature (a struct of `bytes` and `path`), a list of them,
or binary values under a name of `BINARY_NAMES`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from featcache.entries import Element, Unusable, with_text
from featcache.errors import FeatcacheError, ImageError, ManifestError

if TYPE_CHECKING:
    import pyarrow as pa

PREFERRED = ("image", "images", "jpg", "jpeg", "png", "webp", "img")
"""Names by which one of several image columns is chosen, the first of these that is there."""
BINARY_NAMES = (*PREFERRED, "image_bytes", "bytes", "content")
"""Names of binary columns that are taken for images; others hold anything."""
TEXT_NAMES = ("conversations", "caption", "text")
"""Columns with a sample's text, the first of these that is there."""
OTHER_NAMES = ("id", "source", "status")
"""Columns that are read besides: a record's id and source; img2dataset's outcome of a download."""


@dataclass(frozen=True, slots=True)
class Columns:
    """image: name of the image column. struct: its values are {bytes, path}. many: a row has a list
    of them. small: names of the other columns that a record needs."""

    image: str
    struct: bool
    many: bool
    small: tuple[str, ...]


def find_columns(schema: pa.Schema, where: str) -> Columns | None:
    """None where no column holds images. where: for messages.

    Raises ManifestError where several may.
    """
    import pyarrow.types as kinds

    found: dict[str, Columns] = {}
    small = [name for name in TEXT_NAMES if name in schema.names][:1]
    small += [name for name in OTHER_NAMES if name in schema.names]
    for each in schema:
        kind, many = each.type, False
        if kinds.is_list(kind) or kinds.is_large_list(kind):
            kind, many = kind.value_type, True
        if kinds.is_struct(kind):
            names = [kind.field(i).name for i in range(kind.num_fields)]
            if "bytes" in names and "path" in names and _is_binary(kind.field("bytes").type):
                found[each.name] = Columns(each.name, True, many, tuple(small))
        elif _is_binary(kind) and not many and each.name in BINARY_NAMES:
            found[each.name] = Columns(each.name, False, False, tuple(small))
    if len(found) > 1:
        preferred = [name for name in PREFERRED if name in found]
        if not preferred:
            raise ManifestError(
                f"{where} has several columns of images ({', '.join(found)}); rename the one that "
                f'is meant to "image"'
            )
        return found[preferred[0]]
    return next(iter(found.values()), None)


def _is_binary(kind: pa.DataType) -> bool:
    import pyarrow.types as kinds

    return kinds.is_binary(kind) or kinds.is_large_binary(kind) or kinds.is_binary_view(kind)


def element_of(row: dict[str, Any], columns: Columns, name: str) -> Element:
    """A row as an element of a data file, or why it is none.

    row: the values of `columns.small`, and of the image column where that was read: without bytes.
    name: the row's key.
    """
    if row.get("status", "success") != "success":
        return Unusable(f"img2dataset could not get it: {row['status']}")
    if columns.many:
        images = [f"{name}/{k}" for k in range(len(row[columns.image] or ()))]
    else:
        images = [] if row.get(columns.image, ...) is None else [name]
    identity = row.get("id")
    element = {
        "id": name if identity is None else identity,
        "source": row.get("source"),
        "images": images,
    }
    return with_text(element, row)


def image_bytes(value: Any, columns: Columns, member: str, where: str) -> bytes:
    """The bytes of one image of a row's value in the image column.

    member: "<row>", or "<row>/<k>" where a row has many. Raises ImageError, "missing".
    """
    _, *rest = member.split("/")
    if columns.many:
        number = int(rest[0]) if rest and rest[0].isdecimal() else -1
        if value is None or not 0 <= number < len(value):
            raise ImageError("missing", f"{where} holds no image {'/'.join(rest)}")
        value = value[number]
    elif rest:
        raise ImageError("missing", f"{where} holds one image a row")
    data = value["bytes"] if columns.struct and value is not None else value
    if data is None:
        raise ImageError("missing", f"{where} holds no image bytes")
    return bytes(data)


def row_of(member: str, rows: int, where: str) -> int:
    """The row that a member's name begins with. Raises ImageError, "missing"."""
    number = member.split("/", 1)[0]
    # In one spelling only, or one image would have several keys.
    if not number.isdecimal() or str(int(number)) != number or int(number) >= rows:
        raise ImageError("missing", f"{where} holds no row {number}; it has {rows:,}")
    return int(number)


def needs_data_extra(what: str, library: str) -> FeatcacheError:
    """The error for an optional library that is not installed."""
    return FeatcacheError(f"{what} needs {library}: pip install 'featcache[data]'")
