"""Ways to damage a store, by name and seed; shared by the tests of it."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

from featcache.files import publish_json, with_checksum


def files_of(store: Path) -> list[Path]:
    """Every file that the store consists of, each with the same weight whatever its size."""
    return sorted(
        path for path in store.rglob("*") if path.is_file() and path != store / "journal" / "lock"
    )


def flip(store: Path, chance: random.Random) -> list[str]:
    path = chance.choice([path for path in files_of(store) if path.stat().st_size])
    raw = bytearray(path.read_bytes())
    raw[chance.randrange(len(raw))] ^= 1 << chance.randrange(8)
    path.write_bytes(raw)
    return [str(path.relative_to(store))]


def truncate(store: Path, chance: random.Random) -> list[str]:
    path = chance.choice([path for path in files_of(store) if path.stat().st_size])
    raw = path.read_bytes()
    path.write_bytes(raw[: chance.randrange(len(raw))])
    return [str(path.relative_to(store))]


def delete(store: Path, chance: random.Random) -> list[str]:
    path = chance.choice(files_of(store))
    path.unlink()
    return [str(path.relative_to(store))]


def zeros(store: Path, chance: random.Random) -> list[str]:
    """As after a power loss on a file system that had the length on disk and not the data."""
    path = chance.choice([path for path in files_of(store) if any(path.read_bytes())])
    path.write_bytes(bytes(path.stat().st_size))
    return [str(path.relative_to(store))]


def edit_attributes(store: Path, chance: random.Random) -> list[str]:
    """By hand, as who does not know of the checksum."""
    path = store / "zarr.json"
    document = json.loads(path.read_text())
    attributes = document["attributes"]["featcache"]
    kind = chance.choice(["weights", "resample", "codec", "generation", "index", "layers", "shard"])
    if kind == "weights":
        attributes["fingerprint"]["encoder"]["weights"] = "xxh3_128:0"
    elif kind == "resample":
        attributes["fingerprint"]["preprocessing"]["resample"] = "nearest"
    elif kind == "codec":
        attributes["codec"] = "bf16" if attributes["codec"] != "bf16" else "fp16"
    elif kind == "generation":
        attributes["generation"] = chance.choice([0, 1, 7])
    elif kind == "index":
        attributes["index"] = chance.choice([None, "index/00000001", "index/00000009"])
    elif kind == "layers":
        attributes["layers"].reverse()
    else:
        attributes["shard_images"] += 1
    path.write_text(json.dumps(document, indent=1))
    return ["zarr.json"]


def newer_format(store: Path, chance: random.Random) -> list[str]:
    """The number alone, or a whole description that says so."""
    path = store / "zarr.json"
    document = json.loads(path.read_text())
    attributes = document["attributes"]["featcache"]
    attributes["format_version"] += 1
    if chance.random() < 0.5:
        document["attributes"]["featcache"] = with_checksum(attributes)
    publish_json(path, document)
    return ["zarr.json"]


def swap(store: Path, chance: random.Random) -> list[str]:
    """Two files of one kind and different content change places."""
    patterns = ["features/*/c/*/0/0", "pooled/c/*/0", "scales/*/c/*/0", "journal/commit-*"]
    patterns += ["journal/plan-*", "journal/copy/plan-*"]
    while True:
        there = sorted(store.glob(chance.choice(patterns)))
        if len(there) > 1:
            a, b = chance.sample(there, 2)
            first, second = a.read_bytes(), b.read_bytes()
            if first != second:
                a.write_bytes(second)
                b.write_bytes(first)
                return [str(path.relative_to(store)) for path in (a, b)]


def delete_index(store: Path, chance: random.Random) -> list[str]:
    shutil.rmtree(store / "index")
    return ["index"]


def delete_journal(store: Path, chance: random.Random) -> list[str]:
    shutil.rmtree(store / "journal")
    return ["journal"]


def delete_both_copies(store: Path, chance: random.Random) -> list[str]:
    """A vital file, and its second copy."""
    copy = chance.choice(sorted(p for p in (store / "journal/copy").rglob("*") if p.is_file()))
    name = copy.relative_to(store / "journal/copy")
    original = store / (f"journal/{name}" if name.name.startswith("plan-") else name)
    for path in (copy, original):
        path.unlink()
    return [str(path.relative_to(store)) for path in (copy, original)]


KINDS: dict[str, tuple[Callable[[Path, random.Random], list[str]], int]] = {
    "a bit flipped": (flip, 70),
    "truncated": (truncate, 30),
    "deleted": (delete, 30),
    "replaced by zeros": (zeros, 20),
    "attributes edited": (edit_attributes, 14),
    "newer format": (newer_format, 4),
    "two files swapped": (swap, 16),
    "index deleted": (delete_index, 2),
    "journal deleted": (delete_journal, 2),
    "original and copy deleted": (delete_both_copies, 12),
}
"""{kind: (what does it, cases)}: 200 in all. What it does returns the paths concerned."""
