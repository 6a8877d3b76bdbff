"""Looking keys up in an index: exact, also where hashes collide."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from featcache import index
from featcache.index import Index, pack_keys
from featcache.layout import Status


def index_of(keys: list[str]) -> Index:
    """Row i for key i; rows 3, 6, 9, ... have no features."""
    hashes = index.hash_keys([key.encode() for key in keys])
    order = np.argsort(hashes, kind="stable")
    hashes, text, ends = pack_keys([keys[i].encode() for i in order])
    status = np.full(len(keys), Status.OK, np.uint8)
    status[3::3] = Status.UNDECODABLE
    nothing = np.zeros(0, np.uint8)
    return Index(hashes, text, ends, order, nothing, status, nothing, {}, nothing)


@pytest.mark.parametrize("distinct", [1, 2, 7, 2**64 - 1])
@pytest.mark.parametrize("count", [0, 1, 123, 5000])
def test_keys_are_told_apart_by_their_text(
    monkeypatch: pytest.MonkeyPatch, distinct: int, count: int
) -> None:
    if distinct == 1 and count > 123:
        count = 300  # every key is compared with every other
    real = index.hash_keys
    monkeypatch.setattr(index, "hash_keys", lambda encoded: real(encoded) % np.uint64(distinct))
    rng = np.random.default_rng(count)
    keys = ["", "\n", "ä", "ab", "ba", *(f"{'x' * rng.integers(9)}/{i}.jpg" for i in range(count))]
    found = index_of(keys)
    expected = {key: -1 if i and i % 3 == 0 else i for i, key in enumerate(keys)}
    asked = [*keys, "none", "aa", *keys[::-1], "x", "ä\n"]
    rng.shuffle(asked)
    assert found.find(asked).tolist() == [expected.get(key, -1) for key in asked]
    assert sorted(found.keys()) == sorted(keys)


def test_an_empty_index_and_no_keys() -> None:
    assert index_of([]).find(["a", ""]).tolist() == [-1, -1]
    assert index_of(["a"]).find([]).tolist() == []
    assert index_of(["a"]).unreferenced().tolist() == [False]


def test_find_on_mapped_arrays(tmp_path: Path) -> None:
    keys = [f"{i}.png" for i in range(10)]
    found = index_of(keys)
    for name in ("key_hash", "key_bytes", "key_ends", "key_rows"):
        getattr(found, name).tofile(tmp_path / name)
        dtype = getattr(found, name).dtype
        setattr(found, name, np.memmap(tmp_path / name, dtype, mode="r"))
    assert found.find(["4.png", "3.png", "11.png"]).tolist() == [4, -1, -1]
