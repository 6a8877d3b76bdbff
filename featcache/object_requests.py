"""What is asked of an object store: plain functions, so that another process can do it as well.

Each takes obstore's client first and raises what obstore raises; featcache/object_store.py says
what that means, and does it again where that may help.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from featcache.object_store import PART_BYTES, PARTS_AT_ONCE, blocks

if TYPE_CHECKING:
    from obstore.store import ObjectStore


def head(store: ObjectStore, key: str) -> tuple[int, str]:
    """(bytes, what changes whenever it is written) of an object."""
    import obstore

    found = obstore.head(store, key)
    return found["size"], found["e_tag"] or found["version"] or ""


def get(store: ObjectStore, key: str) -> bytes:
    import obstore

    return bytes(obstore.get(store, key).bytes())


def get_at_most(store: ObjectStore, key: str, nbytes: int) -> bytes | int:
    """The bytes, or their number where there are more than `nbytes`; those are not fetched."""
    import obstore

    answer = obstore.get(store, key)
    size = answer.meta["size"]
    return size if size > nbytes else bytes(answer.bytes())


def get_range(store: ObjectStore, key: str, start: int, length: int) -> Any:
    """A buffer of them, fewer where the object ends before; none of them copied."""
    import obstore

    return obstore.get_range(store, key, start=start, length=length)


def download(store: ObjectStore, key: str, place: Path) -> None:
    import obstore

    with place.open("wb") as file:
        for piece in obstore.get(store, key).stream():
            file.write(piece)


def put(store: ObjectStore, key: str, parts: Sequence[bytes | memoryview | int]) -> None:
    """parts: one after the other, numbers as so many zeros."""
    import obstore

    nbytes = sum(part if isinstance(part, int) else memoryview(part).nbytes for part in parts)
    if nbytes <= PART_BYTES:
        obstore.put(store, key, b"".join(blocks(parts)), use_multipart=False)
    else:
        obstore.put(store, key, blocks(parts), chunk_size=PART_BYTES, max_concurrency=PARTS_AT_ONCE)


def put_after(
    store: ObjectStore, key: str, content: bytes | memoryview, before: bytes | None
) -> None:
    """See `ObjectPath.write_after`."""
    import obstore
    from obstore.exceptions import AlreadyExistsError, PreconditionError

    mode: Any = "create"
    if before is not None:
        answer = obstore.get(store, key)
        there = bytes(answer.bytes())
        if there == content:
            return
        if there != before:
            raise PreconditionError
        known = {"e_tag": answer.meta["e_tag"], "version": answer.meta["version"]}
        mode = {name: value for name, value in known.items() if value is not None}
    try:
        obstore.put(store, key, content, mode=mode, use_multipart=False)
    except (AlreadyExistsError, PreconditionError):
        # Perhaps by us: the answer to an earlier attempt may have been lost.
        if bytes(obstore.get(store, key).bytes()) != content:
            raise


def delete(store: ObjectStore, keys: str | Sequence[str]) -> None:
    import obstore

    obstore.delete(store, keys)


def has_any(store: ObjectStore, prefix: str) -> bool:
    import obstore

    return bool(next(iter(obstore.list(store, prefix or None, chunk_size=1)), None))


def listed(store: ObjectStore, prefix: str) -> list[tuple[str, int]]:
    """(key, bytes) of every object below.

    As a whole: a listing that breaks off must not pass for a shorter one.
    """
    import obstore

    found = obstore.list(store, prefix or None).collect()
    return [(entry["path"], entry["size"]) for entry in found]


def listed_directly(store: ObjectStore, prefix: str) -> list[str]:
    """Keys and prefixes one level below, sorted."""
    import obstore

    found = obstore.list_with_delimiter(store, prefix or None)
    return sorted({*(entry["path"] for entry in found["objects"]), *found["common_prefixes"]})
