"""Publishing bytes so that a reader sees all of them or none.

Every file of a store is written under a temporary name beside its place, synced, and renamed.
A temporary name starts with `PARTIAL`; what a killed process leaves is swept by the next run.
In an object store it is one upload, which the server shows when it has all of it.

What is vital carries its checksum: a *sealed* file is read back only where not a byte of it has
changed.
"""

from __future__ import annotations

import io
import json
import os
import secrets
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from featcache.object_path import ObjectPath, StorePath

PARTIAL = ".partial-"
_BLOCK_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Seal:
    """What a file was when it was published: its length, and xxh3_64 of its bytes in hex."""

    nbytes: int
    xxh3_64: str


def publish(path: StorePath, parts: Iterable[bytes | memoryview | int]) -> Seal:
    """Write `parts` one after the other to `path`, atomically.

    parts: bytes, or how many zero bytes to skip: a hole takes no space where the file system knows
    sparse files.
    Raises OSError as the file system gives it (ENOSPC, EACCES, ...), and ObjectStoreError; `path`
    is then untouched.
    """
    if isinstance(path, ObjectPath):
        parts = list(parts)
        path.write(parts)
        return seal_of_parts(parts)
    unsynced = [path.parent]
    while not unsynced[-1].exists():
        unsynced.append(unsynced[-1].parent)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Two workers may write the same shard, on machines where they have the same pid.
    partial = path.with_name(f"{PARTIAL}{path.name}-{secrets.token_hex(8)}")
    try:
        checksum = xxhash.xxh3_64()
        with partial.open("xb", buffering=0) as file:
            for part in parts:
                if isinstance(part, int):
                    _skip(checksum, part)
                    file.seek(part, os.SEEK_CUR)
                    continue
                rest = memoryview(part).cast("B")
                checksum.update(rest)
                while rest:
                    rest = rest[file.write(rest) or 0 :]
            nbytes = file.tell()
            file.truncate(nbytes)
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    for directory in unsynced:
        sync(directory)
    return Seal(nbytes, checksum.hexdigest())


_ZEROS = bytes(_BLOCK_BYTES)


def render_json(document: object) -> bytes:
    """As every JSON file of a store is written. Raises ValueError for NaN or infinity."""
    return json.dumps(document, indent=1, allow_nan=False).encode()


def seal_of_parts(parts: Iterable[bytes | memoryview | int]) -> Seal:
    """The seal of the file that `publish` would write."""
    checksum, nbytes = xxhash.xxh3_64(), 0
    for part in parts:
        if isinstance(part, int):
            _skip(checksum, part)
            nbytes += part
        else:
            checksum.update(part)
            nbytes += memoryview(part).nbytes
    return Seal(nbytes, checksum.hexdigest())


def _skip(checksum: xxhash.xxh3_64, zeros: int) -> None:
    for start in range(0, zeros, len(_ZEROS)):
        checksum.update(_ZEROS[: zeros - start])


def publish_json(path: StorePath, document: object) -> None:
    """`publish` of a JSON document, unless just that is there already.

    Raises OSError, and ValueError for NaN or infinity.
    """
    content = render_json(document)
    if not (path.is_file() and path.read_bytes() == content):
        publish(path, [content])


def publish_after(path: StorePath, content: bytes | memoryview, before: bytes | None) -> None:
    """`publish` that does not overwrite what another process has written meanwhile.

    before: what the file held when it was read, None where there was none. On a disk the store's
    lock keeps others away, and this is `publish`; in an object store, which has no locks, it is
    what keeps two jobs apart.
    Raises OSError; FileExistsError where neither `before` nor `content` is there now.
    """
    if isinstance(path, ObjectPath):
        path.write_after(content, before)
    elif not (path.is_file() and path.read_bytes() == content):
        publish(path, [content])


def remove_tree(path: StorePath) -> None:
    """Remove a folder and all that is in it. Raises OSError."""
    if isinstance(path, ObjectPath):
        path.remove_tree()
    else:
        shutil.rmtree(path)


def read_json(path: StorePath) -> Any:
    """The JSON document at `path`. Raises FileNotFoundError, and ValueError where it is no JSON."""
    return json.loads(path.read_bytes())


def with_checksum(document: dict[str, Any]) -> dict[str, Any]:
    """The document with the checksum of all its other fields as its last one.

    Of their values, not of their order or the blanks between them: other tools may write it again.
    """
    fields = {key: value for key, value in document.items() if key != "checksum"}
    canonical = json.dumps(fields, sort_keys=True, allow_nan=False).encode()
    return {**fields, "checksum": xxhash.xxh3_64_hexdigest(canonical)}


_CHECKSUM = b', "checksum": "'


def seal_json(document: dict[str, Any]) -> bytes:
    """A JSON object on one line, whose last field is xxh3_64 of all bytes before it.

    As quick as the json module is, unlike indented JSON: a store has one a shard.
    Raises ValueError for NaN or infinity.
    """
    body = json.dumps(document, allow_nan=False).encode()[:-1]
    return body + _CHECKSUM + xxhash.xxh3_64_hexdigest(body).encode() + b'"}\n'


def unseal_json(content: bytes) -> dict[str, Any]:
    """What `seal_json` was given. Raises ValueError for any change, be it only of a blank."""
    body = content[: -len(_CHECKSUM) - 19]
    if seal := content[len(body) :]:
        expected = _CHECKSUM + xxhash.xxh3_64_hexdigest(body).encode() + b'"}\n'
        if seal == expected:
            document: dict[str, Any] = json.loads(body + b"}")
            return document
    raise ValueError("it does not match its checksum")


def append_checksum(buffer: io.BytesIO) -> None:
    """Write 8 bytes of xxh3_64 of the buffer behind its content, little-endian: it is sealed."""
    checksum = xxhash.xxh3_64_intdigest(buffer.getbuffer())
    buffer.seek(0, os.SEEK_END)
    buffer.write(checksum.to_bytes(8, "little"))


def unseal(raw: bytes) -> bytes:
    """What was in a buffer before `append_checksum` made it `raw`.

    Raises ValueError for any change.
    """
    content, checksum = raw[:-8], raw[-8:]
    if xxhash.xxh3_64_intdigest(content).to_bytes(8, "little") != checksum:
        raise ValueError("it does not match its checksum")
    return content


def seal_of(*paths: Path) -> Seal:
    """The seal of files as they are now, one after the other; reads them once in small blocks.

    Raises OSError.
    """
    checksum, nbytes = xxhash.xxh3_64(), 0
    block = bytearray(_BLOCK_BYTES)
    for path in paths:
        with path.open("rb", buffering=0) as file:
            while count := file.readinto(block):
                checksum.update(memoryview(block)[:count])
                nbytes += count
    return Seal(nbytes, checksum.hexdigest())


def sweep(root: Path) -> int:
    """Remove what killed writers left below `root`; returns how many files that were.

    Only where nobody is writing: a live writer's partial file would go too.
    """
    partials = list(root.rglob(f"{PARTIAL}*"))
    for partial in partials:
        partial.unlink(missing_ok=True)
    return len(partials)


def sync(path: Path) -> None:
    """Wait until a file, or a directory's list of names, has reached the disk.

    A rename survives a power loss only once its directory has.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
