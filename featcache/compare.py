"""What two stores have in common: how they were made, which images, which failures.

Keys are matched by hash and then by text, all at once: a million in seconds, from mapped indices.

Letters: K keys of the first store, M keys that both stores have.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from featcache.errors import FingerprintMismatch
from featcache.fingerprint import HARMLESS, diff
from featcache.index import Index
from featcache.layout import Status
from featcache.store import Store

SHOWN = 5
"""Examples of every kind that are listed."""


@dataclass(frozen=True, slots=True)
class Field:
    """A field of how the stores were made that differs. harmless: it alone does not make features
    differ by more than rounding (`fingerprint.HARMLESS`)."""

    name: str
    left: Any
    right: Any
    harmless: bool


@dataclass(frozen=True, slots=True)
class Some:
    """How many there are of something, and the keys of the first few by row."""

    count: int
    first: list[str]


@dataclass(frozen=True, slots=True)
class OtherImage:
    """A key that means another image in each store: hex BLAKE2b-128 of the files' bytes."""

    key: str
    left: str
    right: str


@dataclass(frozen=True, slots=True)
class OtherFailure:
    """A key of both stores whose reasons for having no features differ; None: it has features."""

    key: str
    left: str | None
    right: str | None


@dataclass(frozen=True, slots=True)
class Images:
    """The images of two stores.

    only_left, only_right: keys that one has. shared: keys that both have; of them same: the same
    image, byte for byte; other: another one (`other_first`: the first few); the rest could not be
    read when they were planned, in one store or both.
    """

    only_left: Some
    only_right: Some
    shared: int
    same: int
    other: int
    other_first: list[OtherImage]

    @property
    def joinable(self) -> bool:
        """Whether rows of both can be put together by image key."""
        return self.same > 0 and not self.other


@dataclass(frozen=True, slots=True)
class Comparison:
    """fields: those that differ. failures: how many shared keys fail in another way, and the first
    few."""

    fields: list[Field]
    images: Images
    failures: int
    failures_first: list[OtherFailure]

    @property
    def interchangeable(self) -> bool:
        """Whether features of one may stand in for those of the other."""
        return all(field.harmless for field in self.fields)

    @property
    def same(self) -> bool:
        """Interchangeable features of the same keys and images, with the same failures."""
        images = self.images
        return (
            self.interchangeable
            and not (images.only_left.count or images.only_right.count or images.other)
            and not self.failures
        )


def compare(left: Store, right: Store) -> Comparison:
    """RAM: about 50 bytes a key, beyond the mapped indices."""
    matched = _matched(left.index, right.index)
    count, first = _failures(left.index, right.index, *matched)
    return Comparison(fields(left, right), _images(left.index, right.index, *matched), count, first)


def fields(left: Store, right: Store) -> list[Field]:
    """Everything about how two stores were made that differs: fingerprint, codec, shapes."""
    return [
        Field(name, x, y, any(name == each or name.startswith(f"{each}.") for each in HARMLESS))
        for name, x, y in diff(_made(left), _made(right))
    ]


def require_same_images(left: Store, right: Store) -> None:
    """Raise FingerprintMismatch unless every key that both stores have means the same image in
    both, byte for byte, and there is one.

    Keys that only one store has, or whose file could not be read, are not compared.
    """
    images = _images(left.index, right.index, *_matched(left.index, right.index))
    if images.joinable:
        return
    if images.other:
        listed = "; ".join(
            f"{each.key}: {each.left} in {left.path}, {each.right} in {right.path}"
            for each in images.other_first
        )
        more = images.other - len(images.other_first)
        found = f"{images.other:,} of {images.shared:,} shared image keys are other pictures: "
        found += listed + (f"; and {more:,} more" if more else "")
    else:
        found = f"they share {images.shared:,} image keys, and no image"
    raise FingerprintMismatch(
        f"{left.path} and {right.path} are not of the same images: {found}; extract both from the "
        "same image folder"
    )


def _made(store: Store) -> dict[str, Any]:
    return {
        **store.fingerprint,
        "shapes": {
            "layers": list(store.layers),
            "num_patches": store.num_patches,
            "width": store.width,
            "pooled": store.info.pooled,
        },
    }


def _matched(left: Index, right: Index) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Places of the same keys in the two indices: int64[M] each."""
    there = right.places(left.key_hash, left.key_bytes, left.key_ends)
    here = np.flatnonzero(there >= 0)
    return here, there[here]


def _images(
    left: Index, right: Index, here: np.ndarray[Any, Any], there: np.ndarray[Any, Any]
) -> Images:
    rows, others = left.key_rows[here], right.key_rows[there]
    known = (rows >= 0) & (others >= 0)
    same = np.zeros(len(here), np.bool_)
    digests, other_digests = left.digests[rows[known]], right.digests[others[known]]
    same[known] = (digests == other_digests).all(1)
    differing = np.flatnonzero(known & ~same)
    first = _first(left, here[differing], rows[differing])
    chosen = differing[first]
    return Images(
        only_left=_outside(left, here),
        only_right=_outside(right, there),
        shared=len(here),
        same=int(same.sum()),
        other=len(differing),
        other_first=[
            OtherImage(
                left.key(int(here[i])),
                left.digests[rows[i]].tobytes().hex(),
                right.digests[others[i]].tobytes().hex(),
            )
            for i in chosen.tolist()
        ],
    )


def _outside(index: Index, matched: np.ndarray[Any, Any]) -> Some:
    """Keys that are not among the matched places."""
    outside = np.ones(len(index.key_hash), np.bool_)
    outside[matched] = False
    places = np.flatnonzero(outside)
    first = _first(index, places, index.key_rows[places])
    return Some(len(places), [index.key(place) for place in places[first].tolist()])


def _first(index: Index, places: np.ndarray[Any, Any], rows: np.ndarray[Any, Any]) -> Any:
    """int64[up to SHOWN]: which of some keys come first in the data: of the lowest rows.

    Keys stand in the index by hash, which says nothing to people.
    """
    if len(rows) <= SHOWN:
        return np.argsort(rows, kind="stable")
    lowest = np.argpartition(rows, SHOWN)[:SHOWN]
    return lowest[np.argsort(rows[lowest], kind="stable")]


def _failures(
    left: Index, right: Index, here: np.ndarray[Any, Any], there: np.ndarray[Any, Any]
) -> tuple[int, list[OtherFailure]]:
    """Shared keys whose reasons differ: how many, and the first few by key."""
    failing = ~(_has(left, left.key_rows[here]) & _has(right, right.key_rows[there]))
    found: list[OtherFailure] = []
    ledgers: Sequence[Any] = left.failures, right.failures
    for place in here[failing].tolist():
        key = left.key(place)
        reasons = [ledger[key].reason if key in ledger else None for ledger in ledgers]
        if reasons[0] != reasons[1]:
            found.append(OtherFailure(key, *reasons))
    found.sort(key=lambda each: each.key)
    return len(found), found[:SHOWN]


def _has(index: Index, rows: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """bool[len(rows)]: whether these rows, or -1, have features."""
    has = rows >= 0
    has[has] = index.status[rows[has]] == Status.OK
    return has
