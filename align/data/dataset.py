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

from align.data.holdout import STRATA, hold_out
from align.data.mixing import FileShare, Mixture, compose, pair_up, repeats, unroll
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
    weights: list[float] = field(default_factory=list)
    """How often the records of each of `files` come in an epoch of training, one number a file:
    0.5 takes half of them, 2.5 all twice and half of them once more. Empty takes all once."""
    eval_ratio: float = 0.02
    """Share of the samples held out for validation; 0 holds nothing out."""
    stratify: str = "none"
    """"length" holds out the same share of short and of long answers; "none" does not look at
    them."""
    seed: int = 0
    """Decides which samples are held out, which come more often by `weights`, and which are
    paired."""
    multi_image_ratio: float = 0.0
    """Share of the training samples that are composed of two single-image records ("Image 1: ...
    Image 2: ..."), which are then not used by themselves."""
    max_images: int | None = 2
    """Records with more images are left out; null takes any number."""
    text_only: str = "skip"
    """What is done with records without images: "skip" leaves them out, "train" uses them."""
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
        if self.stratify not in STRATA:
            yield f"stratify: must be one of {', '.join(STRATA)}, got {self.stratify!r}"
        if not all(math.isfinite(weight) and weight >= 0 for weight in self.weights):
            yield f"weights: must be at least 0 and finite, got {self.weights}"
        elif self.weights and not any(self.weights):
            yield f"weights: at least one must be above 0, got {self.weights}"
        if not 0 <= self.multi_image_ratio <= 1:
            yield f"multi_image_ratio: must be in [0, 1], got {self.multi_image_ratio}"
        if self.max_images is not None and self.max_images < 1:
            yield f"max_images: must be at least 1 or null, got {self.max_images}"
        if self.multi_image_ratio and self.max_images == 1:
            yield "multi_image_ratio: composes samples of two images, where max_images=1 allows one"
        if self.text_only not in ("skip", "train"):
            yield f'text_only: must be "skip" or "train", got {self.text_only!r}'
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
        # In this order: one thread may print what another one adds.
        names = self.first.setdefault(reason, [])
        if len(names) < 3:
            names.append(name)
        self.counts[reason] = self.counts.get(reason, 0) + 1

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
    mixture: what `train` is made of.
    shared_images: images of validation files that are trained on as well.
    """

    train: list[Sample]
    val: list[Sample]
    found: int
    left_out: LeftOut
    left_out_records: list[LeftOutRecord]
    division: str
    mixture: Mixture
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
    or of this one after a repair, leave every other record where it was. So are weights and pairs,
    and both only for what is trained on.

    Raises DataError where a file is not named anywhere, nothing remains to train on, a larger
    share than `data.max_missing` has no features, or weights or pairs do not fit the records;
    ManifestError where a file cannot be read.
    """
    held = {_place(file) for file in config.val_files}
    if twice := [file for file in config.files if _place(file) in held]:
        raise DataError(
            f"data.val_files: {', '.join(twice)} is in data.files as well; what is trained on "
            "cannot be held out: name it in one of them"
        )
    config = with_sources(config, stores.stores[0])
    assert config.images is not None
    files = config.files
    if config.weights and len(config.weights) != len(files):
        raise DataError(
            f"data.weights: {len(config.weights)} numbers for {len(files)} data files "
            f"({', '.join(files)}); give one for each"
        )
    unusable: list[LeftOutRecord] = []
    missing: list[LeftOutRecord] = []
    joined, file_of, found = _load(
        files, config, template, stores, unusable, missing, config.max_samples
    )
    records = [each.record if isinstance(each, Sample) else each for each in joined]
    if config.val_files:
        held_out = np.zeros(len(records), np.bool_)
    else:
        held_out = hold_out(records, config.eval_ratio, config.seed, config.stratify)
    val = _usable(joined, held_out)
    trainable = len(_usable(joined, ~held_out))
    if not trainable:
        left_out = LeftOut.of(unusable + missing)
        why = str(left_out) if left_out.total else "the files are empty"
        cure = f"; {_how_to_add_features(stores)}" if missing else ""
        raise DataError(
            f"{', '.join(map(str, files))}: none of {found:,} records can be trained on with "
            f"{_paths(stores)}: {why}{cure}"
        )
    train, mixture = _mix(joined, file_of, ~held_out, config, template)
    if not any(len(sample.rows) for sample in train):
        raise DataError(
            f"{', '.join(map(str, files))}: none of the records has an image, and from text alone "
            "a connector learns nothing; name files with images in data.files"
        )
    found_val = shared = 0
    if config.val_files:
        joined_val, _, found_val = _load(
            config.val_files, config, template, stores, unusable, missing, None
        )
        val = _usable(joined_val, np.ones(len(joined_val), np.bool_))
        shared = len(_first_rows(train) & _first_rows(val))
    _require_features(trainable + len(val), missing, config.max_missing, stores)
    left_out_records = unusable + missing
    return DataSplits(
        train=train,
        val=val,
        found=found + found_val,
        left_out=LeftOut.of(left_out_records),
        left_out_records=left_out_records,
        division=_division(records, held_out),
        mixture=mixture,
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


def _mix(
    joined: Sequence[Sample | Record],
    file_of: NDArray[np.int32],
    trained: NDArray[np.bool_],
    config: DataConfig,
    template: TemplateConfig,
) -> tuple[list[Sample], Mixture]:
    """The training samples: records by the weights of their files, some of them in pairs.

    file_of: int32[n], of each record. trained: bool[n]. What was drawn and has no features is left
    out; of a pair, the other one stays by itself.
    """
    chosen = np.flatnonzero(trained)
    records = [each.record if isinstance(each, Sample) else each for each in joined]
    candidates = [records[i] for i in chosen]
    times = np.zeros(len(joined), np.int64)
    times[chosen] = repeats(candidates, file_of[chosen], config.weights, config.seed)
    entries = unroll(times).tolist()
    pairs = pair_up([records[i] for i in entries], config.multi_image_ratio, config.seed)
    partner = {min(pair): pair for pair in pairs}
    is_second = {max(pair) for pair in pairs}
    train: list[Sample] = []
    composed = 0
    for place, i in enumerate(entries):
        if place in is_second:
            continue
        of_place = [joined[entries[each]] for each in partner.get(place, ())] or [joined[i]]
        samples = [each for each in of_place if isinstance(each, Sample)]
        if len(samples) == 2:
            composed += 1
            samples = [_composed(samples[0], samples[1], template.prompt_many)]
        train += samples
    if not train:
        raise DataError(
            f"data.weights={config.weights}: leave none of the records that have features to train "
            "on; make them larger"
        )
    usable = np.array([isinstance(each, Sample) for each in joined], np.bool_)
    shares = [
        FileShare(
            file,
            weight,
            int(np.count_nonzero(usable & trained & (file_of == number))),
            int(times[usable & (file_of == number)].sum()),
        )
        for number, (file, weight) in enumerate(
            zip(config.files, config.weights or [1.0] * len(config.files), strict=True)
        )
    ]
    return train, Mixture(tuple(shares), composed)


def _composed(first: Sample, second: Sample, question: str) -> Sample:
    return Sample(
        compose(first.record, second.record, question), np.concatenate([first.rows, second.rows])
    )


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


def _load(
    files: Sequence[str],
    config: DataConfig,
    template: TemplateConfig,
    stores: StoreJoin,
    unusable: list[LeftOutRecord],
    missing: list[LeftOutRecord],
    limit: int | None,
) -> tuple[list[Sample | Record], NDArray[np.int32], int]:
    """Of some files in their order the usable samples, among them the records for which only
    features are missing; int32[n], which of the files each is from; and how many records the files
    hold.

    Adds the latter to `missing`, those that cannot be used to `unusable`. Ends after the first
    `limit` samples.
    """
    manifest = read_manifest(files, config.images)
    for skipped in manifest.skipped:
        unusable.append(LeftOutRecord(skipped.origin, skipped.reason, skipped.origin, ()))
    fitting: list[Record] = []
    file_of: list[int] = []
    numbers = np.repeat(np.arange(len(manifest.counts)), manifest.counts).tolist()
    for record, number in zip(manifest.records, numbers, strict=True):
        try:
            _require_wanted(record, config)
            render(record, template)
        except (DataError, TemplateError) as error:
            unusable.append(LeftOutRecord(record.id, str(error), record.origin, record.images))
        else:
            fitting.append(record)
            file_of.append(number)
    joined: list[Sample | Record] = []
    usable = 0
    for each in _join(fitting, stores, missing):
        joined.append(each)
        usable += isinstance(each, Sample)
        if usable == limit:
            break
    found = len(manifest.records) + len(manifest.skipped)
    return joined, np.array(file_of[: len(joined)], np.int32), found


def _require_wanted(record: Record, config: DataConfig) -> None:
    """Raises DataError for a record that the config leaves out, whatever the template can do."""
    if not record.images and config.text_only == "skip":
        raise DataError("no image (data.text_only=skip)")
    if config.max_images is not None and len(record.images) > config.max_images:
        raise DataError(f"more images than data.max_images={config.max_images}")


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
