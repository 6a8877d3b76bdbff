"""Records joined with stored features, and their split into training and validation.

Nothing is tokenised here: 558K captions would delay the first step by a minute.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import xxhash
from numpy.typing import NDArray

from align.data.templates import TemplateConfig, render
from align.errors import DataError, TemplateError
from featcache.join import StoreJoin
from featcache.manifests import Record, read_manifest
from featcache.object_path import StorePath, parse_location
from featcache.store import Store


@dataclass
class DataConfig:
    """Which records, and which of them are held out."""

    files: list[str] = field(default_factory=list)
    """Whatever `featcache extract --data` takes (docs/inputs.md); empty takes what the store was
    last extracted from, without `val_files`. A run's own config names them."""
    images: str | None = None
    """Folder that image paths are relative to; null takes the store's. A run's own config names
    it."""
    val_files: list[str] = field(default_factory=list)
    """Files held out for validation; when given, nothing is held out of `files`."""
    eval_ratio: float = 0.02
    """Share of the samples held out for validation; 0 holds nothing out."""
    seed: int = 0
    """Decides which samples are held out."""
    max_samples: int | None = None
    """Use only the first so many samples (of `files`, before the split); null uses all."""
    max_length: int = 1536
    """Longest sequence in tokens, visual ones included; longer ones lose the end of the answer."""
    max_missing: float = 0.05
    """Largest share of the records, of those that could be used otherwise, whose images have no
    features in the store; above it the data is refused. 0 allows none, 1 any."""

    def problems(self) -> Iterator[str]:
        """What is wrong with the values, one "field: reason" each."""
        if not 0 <= self.eval_ratio < 1:
            yield f"eval_ratio: must be in [0, 1), got {self.eval_ratio}"
        if self.max_samples is not None and self.max_samples < 1:
            yield f"max_samples: must be at least 1 or null, got {self.max_samples}"
        if self.max_length < 1:
            yield f"max_length: must be at least 1, got {self.max_length}"
        if not 0 <= self.max_missing <= 1:
            yield f"max_missing: must be in [0, 1], got {self.max_missing}"


@dataclass(frozen=True, slots=True)
class LeftOutRecord:
    """A record that cannot be used.

    id: the record's own; its place in the data file where it is malformed.
    reason: in few words, alike for all records that lack the same.
    detail: "key: why" of each image without features, all that the store's ledger says of it; for
        other reasons the record's place in the data file, e.g. "train.jsonl:12".
    images: its image keys; none where it is malformed.
    """

    id: str
    reason: str
    detail: str
    images: tuple[str, ...]


@dataclass(slots=True)
class LeftOut:
    """Samples that cannot be used, by reason, with the first few record ids of each."""

    counts: dict[str, int] = field(default_factory=dict)
    first: dict[str, list[str]] = field(default_factory=dict)

    @classmethod
    def of(cls, records: Iterable[LeftOutRecord]) -> LeftOut:
        """The records counted."""
        left_out = cls()
        for record in records:
            left_out.add(record.reason, record.id)
        return left_out

    def add(self, reason: str, name: str) -> None:
        """One more, `name` being a record's id or origin."""
        self.counts[reason] = self.counts.get(reason, 0) + 1
        names = self.first.setdefault(reason, [])
        if len(names) < 3:
            names.append(name)

    @property
    def total(self) -> int:
        """All of them."""
        return sum(self.counts.values())

    def __str__(self) -> str:
        """E.g. '3 no caption (a, b, c); 1 not in the store (d)'."""
        return "; ".join(
            f"{count:,} {reason} ({', '.join(self.first[reason])}{', ...' * (count > 3)})"
            for reason, count in sorted(self.counts.items(), key=lambda item: -item[1])
        )


@dataclass(frozen=True, slots=True)
class Sample:
    """A record whose images all have features.

    rows: int64[k, K], of each of the record's k images the row in each of K stores.
    """

    record: Record
    rows: NDArray[np.int64]


@dataclass(slots=True)
class DataSplits:
    """What is trained on and what is held out.

    found: records in the files, before anything was left out.
    left_out: the `left_out_records` counted.
    division: digest of which records were held out of `files` and which were not, in order; those
        without features count, so it is the same whatever the store holds.
    shared_images: images of validation files that are trained on as well.
    """

    train: list[Sample]
    val: list[Sample]
    found: int
    left_out: LeftOut
    left_out_records: list[LeftOutRecord]
    division: str
    shared_images: int = 0

    def split(self, name: str) -> list[Sample]:
        """The samples of "train" or "val".

        Raises DataError for another name, or where the split is empty.
        """
        if name not in ("train", "val"):
            raise DataError(f"split {name}: there are train and val")
        samples = self.train if name == "train" else self.val
        if not samples:
            raise DataError(
                f"split {name}: is empty; "
                + ("set data.eval_ratio above 0 or give data.val_files" * (name == "val"))
                + ("every record was left out" * (name == "train"))
            )
        return samples


def with_sources(config: DataConfig, store: Store) -> DataConfig:
    """The config with `files` and `images` named: where it leaves them out, the store's latest.

    What a run keeps, since a store's latest data are others once more were appended.

    Raises DataError where no file remains.
    """
    held = {_place(file) for file in config.val_files}
    files = config.files or [f for f in store.source["data"] if _place(f) not in held]
    if not files:
        raise DataError(
            f"data.val_files: hold all that {store.path} was extracted from, so nothing remains to "
            "train on; name other files in data.files, or set data.eval_ratio instead"
        )
    return replace(config, files=files, images=config.images or store.source["images"])


def _place(file: str) -> StorePath:
    """By which two names of one file are the same."""
    path = parse_location(file)
    return path.resolve() if isinstance(path, Path) else path


def build_splits(config: DataConfig, template: TemplateConfig, stores: StoreJoin) -> DataSplits:
    """Reads the data files, joins them with the stores by image key, and holds out a split.

    A record's side is decided before it is known whether it has features: those of another store,
    or of this one after a repair, leave every other record where it was.

    Raises DataError where a file is not named anywhere, nothing remains to train on, or a larger
    share than `data.max_missing` has no features; ManifestError where a file cannot be read.
    """
    held = {_place(file) for file in config.val_files}
    if twice := [file for file in config.files if _place(file) in held]:
        raise DataError(
            f"data.val_files: {', '.join(twice)} is in data.files as well; what is trained on "
            "cannot be held out: name it in one of them"
        )
    config = with_sources(config, stores.stores[0])
    assert config.images is not None
    files, images = config.files, config.images
    unusable: list[LeftOutRecord] = []
    missing: list[LeftOutRecord] = []
    joined, found = _load(files, images, template, stores, unusable, missing, config.max_samples)
    records = [each.record if isinstance(each, Sample) else each for each in joined]
    if config.val_files:
        held_out = np.zeros(len(records), np.bool_)
    else:
        held_out = hold_out(records, config.eval_ratio, config.seed)
    train, val = _usable(joined, ~held_out), _usable(joined, held_out)
    if not train:
        left_out = LeftOut.of(unusable + missing)
        why = str(left_out) if left_out.total else "the files are empty"
        cure = f"; {_how_to_add_features(stores)}" if missing else ""
        raise DataError(
            f"{', '.join(map(str, files))}: none of {found:,} records can be trained on with "
            f"{_paths(stores)}: {why}{cure}"
        )
    found_val = shared = 0
    if config.val_files:
        joined_val, found_val = _load(
            config.val_files, images, template, stores, unusable, missing, None
        )
        val = _usable(joined_val, np.ones(len(joined_val), np.bool_))
        shared = len(_first_rows(train) & _first_rows(val))
    _require_features(len(train) + len(val), missing, config.max_missing, stores)
    left_out_records = unusable + missing
    return DataSplits(
        train=train,
        val=val,
        found=found + found_val,
        left_out=LeftOut.of(left_out_records),
        left_out_records=left_out_records,
        division=_division(records, held_out),
        shared_images=shared,
    )


def shards_of(samples: Sequence[Sample], shard_images: int) -> NDArray[np.int32]:
    """int32[n]: which shard of the first store each sample's first image lies in; 0..S - 1 count
    those in use.

    Samples without images, which nothing is read for, are dealt out to all shards in turn: a
    shuffle within windows of shards then has them everywhere, not all at once.

    shard_images: rows a shard.
    """
    first = np.fromiter(
        (sample.rows[0, 0] if len(sample.rows) else -1 for sample in samples),
        np.int64,
        len(samples),
    )
    has_image = first >= 0
    used, number = np.unique(first[has_image] // shard_images, return_inverse=True)
    shards = np.empty(len(samples), np.int32)
    shards[has_image] = number
    shards[~has_image] = np.arange(np.count_nonzero(~has_image)) % max(1, len(used))
    return shards


def _usable(joined: Sequence[Sample | Record], chosen: NDArray[np.bool_]) -> list[Sample]:
    return [
        each
        for each, is_in in zip(joined, chosen, strict=True)
        if is_in and isinstance(each, Sample)
    ]


def _division(records: Sequence[Record], held_out: NDArray[np.bool_]) -> str:
    digest = xxhash.xxh3_64()
    for record, out in zip(records, held_out.tolist(), strict=True):
        digest.update(json.dumps([record.id, *record.images, out]).encode() + b"\n")
    return digest.hexdigest()


def _require_features(
    usable: int, missing: Sequence[LeftOutRecord], max_missing: float, stores: StoreJoin
) -> None:
    """Raises DataError where too many of the usable and the `missing` records are `missing`."""
    total = usable + len(missing)
    if not missing or len(missing) / total <= max_missing:
        return
    enough = -(-100 * len(missing) // total) / 100  # rounded up, so that it is accepted
    raise DataError(
        f"{_paths(stores)}: {len(missing):,} of {total:,} records have no features in it, "
        f"{len(missing) / total:.1%} where data.max_missing={max_missing:g} allows "
        f"{max_missing:.1%}: {LeftOut.of(missing)}; {_how_to_add_features(stores)}; to do without "
        f"them, set data.max_missing={enough:g} (for `align eval`, in the run's config.yaml)"
    )


def _first_rows(samples: Sequence[Sample]) -> set[int]:
    """Rows of the first store."""
    return {row for sample in samples for row in sample.rows[:, 0].tolist()}


def _paths(stores: StoreJoin) -> str:
    return " and ".join(str(store.path) for store in stores.stores)


def _how_to_add_features(stores: StoreJoin) -> str:
    return "; ".join(map(_how_to_add_to, stores.stores))


def _how_to_add_to(store: Store) -> str:
    listed = f"`featcache failures {store.path}` lists the images to mend first"
    if store.form.one_file:
        return (
            f"to add features, run `featcache extract` with this data on the folder that it was "
            f"converted from, and convert that again ({listed})"
        )
    return f"to add features, run `featcache extract --out {store.path}` with this data ({listed})"


def num_held_out(samples: int, ratio: float) -> int:
    """How many of `samples` go to validation: the nearest whole number, at least 1 if ratio > 0.

    558,128 at 0.02 are 11,163; one sample stays for training whatever the ratio.
    """
    if ratio == 0 or samples < 2:
        return 0
    return min(samples - 1, max(1, math.floor(samples * ratio + 0.5)))


def hold_out(records: Sequence[Record], ratio: float, seed: int) -> NDArray[np.bool_]:
    """bool[n], true where a record belongs to validation.

    Records are ranked by a hash of (seed, first image, id) and the lowest are held out, so a
    record's side does not depend on the order of the file, and hardly on which other records there
    are: dropping one moves at most one other. Records of one image are neighbours in that order, so
    an image's captions stay on one side, but for at most one image at the border.
    """

    def rank(record: Record) -> tuple[int, str]:
        group = record.images[0] if record.images else record.id
        return xxhash.xxh3_64_intdigest(f"{seed}:{group}".encode()), record.id

    mask = np.zeros(len(records), np.bool_)
    order = sorted(range(len(records)), key=lambda i: rank(records[i]))
    mask[order[: num_held_out(len(records), ratio)]] = True
    return mask


def _load(
    files: Sequence[str | Path],
    images: str | Path,
    template: TemplateConfig,
    stores: StoreJoin,
    unusable: list[LeftOutRecord],
    missing: list[LeftOutRecord],
    limit: int | None,
) -> tuple[list[Sample | Record], int]:
    """Of some files in their order the usable samples, among them the records for which only
    features are missing; and how many records the files hold.

    Adds the latter to `missing`, those that cannot be used to `unusable`. Ends after the first
    `limit` samples.
    """
    manifest = read_manifest(files, images)
    for skipped in manifest.skipped:
        unusable.append(LeftOutRecord(skipped.origin, skipped.reason, skipped.origin, ()))
    fitting: list[Record] = []
    for record in manifest.records:
        try:
            render(record, template)
        except TemplateError as error:
            unusable.append(LeftOutRecord(record.id, str(error), record.origin, record.images))
        else:
            fitting.append(record)
    joined: list[Sample | Record] = []
    usable = 0
    for each in _join(fitting, stores, missing):
        joined.append(each)
        usable += isinstance(each, Sample)
        if usable == limit:
            break
    return joined, len(manifest.records) + len(manifest.skipped)


def _join(
    records: Sequence[Record], stores: StoreJoin, missing: list[LeftOutRecord]
) -> Iterator[Sample | Record]:
    """Samples of the records whose images all have a row in every store; the others as they are,
    and added to `missing`."""
    rows = stores.rows([key for record in records for key in record.images])
    start = 0
    for record in records:
        own = rows[start : start + len(record.images)]
        start += len(record.images)
        if (own < 0).any():
            # Of an image that several stores lack, what the first of them says.
            why = {
                record.images[i]: stores.stores[int((own[i] < 0).argmax())].reason(record.images[i])
                for i in np.flatnonzero((own < 0).any(1)).tolist()
            }
            # The ledger's detail differs from file to file; its first word is what can be counted.
            reason = f"image {next(iter(why.values())).split(':')[0]}"
            detail = "; ".join(f"{key}: {text}" for key, text in why.items())
            missing.append(LeftOutRecord(record.id, reason, detail, record.images))
            yield record
        else:
            yield Sample(record, own)
