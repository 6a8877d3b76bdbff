"""Images -> features -> store: scan, plan, encode shard by shard, commit, compile the index.

What decides the bytes of a shard is fixed before work starts (the plan, and the batch
boundaries within each shard), so they do not depend on kills, reruns or the number of workers.

RAM: what featcache/encode.py states, and about 2 KB a record while the data files are read and
planned: 1.2 GB for 558K images.
"""

from __future__ import annotations

import fcntl
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from featcache.codecs import Codec, get_codec
from featcache.encode import ShardEncoder, Sources
from featcache.encoders import Encoder, load_encoder
from featcache.errors import ConfigError, CorruptStoreError, ManifestError, StoreError
from featcache.files import publish_json, sweep
from featcache.fingerprint import fingerprint, require_same
from featcache.index import Index, compile_index, write_group
from featcache.journal import Journal, Plan, merge, num_rows
from featcache.layout import ShardGeometry, Status, StoreInfo, array_metadata, features_path
from featcache.manifests import Manifest, read_manifest
from featcache.planning import plan_extraction
from featcache.writer import write_error

DEFAULT_BATCH_SIZE = {"cuda": 64, "cpu": 16}
DEFAULT_SHARD_IMAGES = 128


@dataclass(frozen=True, slots=True)
class ExtractOptions:
    """What to extract, and how. Defaults are the command line's.

    model: registered name, hub id or folder. data, image_root: see `read_manifest`.
    layers: stored outputs, see `Encoder`. batch_size: images per forward; None chooses by device.
    shard_images: rows a shard; None takes the store's, 128 for a new one. workers: decoding
    threads. limit: only the first images.
    max_failures: ratio of images without features above which the result is not ok.
    """

    model: str
    data: tuple[Path, ...]
    out: Path
    image_root: Path | None = None
    layers: tuple[str, ...] = ("-2",)
    codec: str = "fp16"
    batch_size: int | None = None
    device: str = "cpu"
    shard_images: int | None = None
    workers: int = 2
    limit: int | None = None
    max_failures: float = 0.01
    random_weights: bool = False
    dry_run: bool = False


@dataclass(frozen=True, slots=True)
class ExtractProgress:
    """A snapshot for display; each stage begins with one of done = 0.

    stage: "scan" (hashing image files) or "encode". seconds: per stage of the pipeline, so far.
    """

    stage: str
    done: int
    total: int
    failed: int = 0
    seconds: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ExtractResult:
    """What an extraction came to.

    images: distinct image keys of the data; features: those with features (in a dry run, those
    whose file can be read); new: images encoded by this run; failures: {reason: count};
    skipped: {reason: (count, the first one's file and line)} of records that cannot be used;
    nbytes: of the features that this run adds; free_bytes: at `path`, before it.
    ok: the failures are within what was allowed, and none is an overflow of the codec.
    """

    path: Path
    images: int
    features: int
    new: int
    failures: dict[str, int]
    skipped: dict[str, tuple[int, str]]
    nbytes: int
    free_bytes: int
    seconds: float
    ok: bool


OnProgress = Callable[[ExtractProgress], None]


def extract(options: ExtractOptions, on_progress: OnProgress = lambda _: None) -> ExtractResult:
    """Bring the store at `options.out` up to date with the data; run again after any stop.

    Raises ManifestError, EncoderError, ConfigError, StoreError (another extraction is running,
    the disk is full or too small), FingerprintMismatch (the store was made by other means).
    """
    start = time.monotonic()
    codec = get_codec(options.codec)
    manifest = read_manifest(options.data, options.image_root)
    keys = manifest.image_keys()[: options.limit]
    if not keys:
        raise ManifestError(f"{manifest.files[0]}: no record names an image; nothing to extract")
    # Only the keys are needed from here on; 558K records with their texts are most of a GB.
    manifest.records.clear()
    encoder = load_encoder(
        options.model,
        layers=options.layers,
        device=options.device,
        random_weights=options.random_weights,
    )
    try:
        _require_ours(options.out)
        with _locked(options.out, create=not options.dry_run):
            result = _update(options, encoder, codec, manifest, keys, on_progress)
    except OSError as error:
        raise write_error(options.out, error) from error
    return replace(result, seconds=time.monotonic() - start)


def _update(
    options: ExtractOptions,
    encoder: Encoder,
    codec: Codec,
    manifest: Manifest,
    keys: list[str],
    on_progress: OnProgress,
) -> ExtractResult:
    """Plan, encode and commit into a locked store; in a dry run only plan. Raises as `extract`."""
    out, root = options.out, manifest.image_root.absolute()
    info = _describe(encoder, codec, options, manifest)
    journal = Journal.load(out)
    on_progress(ExtractProgress("scan", 0, len(keys)))
    plan = plan_extraction(
        journal,
        keys,
        root,
        info.shard_images,
        options.batch_size or DEFAULT_BATCH_SIZE[encoder.device.type],
        options.workers,
        lambda done: on_progress(ExtractProgress("scan", done, len(keys))),
    )
    plans, pending = list(journal.plans), list(journal.pending)
    if plan:
        plans.append(plan)
        pending += [(plan, shard) for shard in plan.shards]
    new = sum(len(each.digests_of(shard)) for each, shard in pending)
    geometry = ShardGeometry(
        info.shard_images, encoder.num_patches * encoder.width * codec.itemsize
    )
    nbytes = len(info.layers) * (new * geometry.pitch_bytes + len(pending) * geometry.index_bytes)
    free_bytes = _require_space(options, nbytes)

    if options.dry_run:
        missing = merge(plans).missing
        failures = Counter(missing[key].reason for key in keys if key in missing)
    else:
        prepare_store(out, info, codec, plans, plan)
        if plan or pending or not _index_is_current(out, info, journal):
            sources = Sources(plans, root)
            with ShardEncoder(out, encoder, codec, geometry, sources, options.workers) as work:
                on_progress(ExtractProgress("encode", 0, new))
                for done, failed in work.run(pending):
                    on_progress(ExtractProgress("encode", done, new, failed, work.seconds))
            compile_index(out, info, Journal.load(out))
        index = Index.load(out, info)
        rows = zip(keys, index.find(keys).tolist(), strict=True)
        failures = Counter(index.failures[key].reason for key, row in rows if row < 0)
    failed = sum(failures.values())
    skipped = Counter(record.reason for record in manifest.skipped)
    first = {record.reason: record.origin for record in reversed(manifest.skipped)}
    return ExtractResult(
        path=out,
        images=len(keys),
        features=len(keys) - failed,
        new=new,
        failures=dict(failures),
        skipped={reason: (count, first[reason]) for reason, count in skipped.items()},
        nbytes=nbytes,
        free_bytes=free_bytes,
        seconds=0.0,
        ok=failed <= options.max_failures * len(keys) and not failures[Status.OVERFLOW.reason],
    )


def _require_ours(out: Path) -> None:
    """Raises StoreError where `out` is something else than a store, whole or begun."""
    if not out.exists():
        return
    if not out.is_dir():
        raise StoreError(f"{out} is a file; choose another --out")
    ours = (out / "zarr.json").exists() or (out / "journal" / "lock").exists()
    if not ours and any(out.iterdir()):
        raise StoreError(f"{out} exists and is no feature store; choose another --out or remove it")


def _describe(
    encoder: Encoder, codec: Codec, options: ExtractOptions, manifest: Manifest
) -> StoreInfo:
    """The description of the store to be: that of the one there, where it is of the same making.

    Raises StoreError, FingerprintMismatch, ConfigError.
    """
    info = StoreInfo(
        fingerprint=fingerprint(encoder),
        codec=codec.name,
        layers=list(encoder.layers),
        num_patches=encoder.num_patches,
        width=encoder.width,
        shard_images=options.shard_images or DEFAULT_SHARD_IMAGES,
        pooled=encoder.model.use_head,
    )
    if (options.out / "zarr.json").exists():
        there = StoreInfo.load(options.out)
        require_same(
            {**there.fingerprint, "codec": there.codec},
            {**info.fingerprint, "codec": info.codec},
            left_name=str(options.out),
            right_name="this command",
            cure="choose another --out, or the options that the store was made with",
        )
        if options.shard_images not in (None, there.shard_images):
            raise ConfigError(
                f"{options.out} has {there.shard_images} images a shard, not "
                f"{options.shard_images}; leave --shard-images out"
            )
        info = there
    info.source = {
        "data": [str(path.absolute()) for path in manifest.files],
        "images": str(manifest.image_root.absolute()),
    }
    return info


def _index_is_current(root: Path, info: StoreInfo, journal: Journal) -> bool:
    """Whether the index says what the journal says: a run may have been stopped between its last
    commit record and the index, or the index may be damaged."""
    if info.index is None or info.generation != max(plan.generation for plan in journal.plans):
        return False
    try:
        return np.array_equal(Index.load(root, info).status, journal.status)
    except CorruptStoreError:
        return False


def prepare_store(
    root: Path, info: StoreInfo, codec: Codec, plans: Sequence[Plan], new: Plan | None
) -> None:
    """Everything that must be in place before the first shard. The root's metadata come first:
    by them a begun store is known as one. The plan comes last. Raises OSError."""
    info.save(root)
    rows = num_rows(plans)
    shards = -(-rows // info.shard_images)
    image = (info.num_patches, info.width)
    write_group(root / "features")
    for layer in info.layers:
        metadata = array_metadata(
            (rows, *image),
            codec.zarr_dtype,
            chunk=(info.shard_images, *image),
            inner_chunk=(1, *image),
            # A row without features reads as NaN, never as zeros.
            fill_value="NaN",
        )
        publish_json(root / features_path(layer) / "zarr.json", metadata)
    if info.pooled:
        metadata = array_metadata(
            (rows, info.width),
            codec.zarr_dtype,
            chunk=(info.shard_images, info.width),
            fill_value="NaN",
        )
        publish_json(root / "pooled" / "zarr.json", metadata)
    journal = array_metadata((shards,), "uint8", chunk=(max(1, shards),))
    publish_json(root / "journal" / "zarr.json", journal)
    if new:
        new.save(root)


def _require_space(options: ExtractOptions, needed: int) -> int:
    """Free bytes at `out`. Raises StoreError where `needed` bytes do not fit."""
    place = options.out.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if needed > free:
        raise StoreError(
            f"{options.out} needs {needed / 1e9:.1f} GB more and {place} has {free / 1e9:.1f} GB "
            "free; free some space, choose another --out, or take fewer images with --limit"
        )
    return free


@contextmanager
def _locked(root: Path, *, create: bool) -> Iterator[None]:
    """Hold the store for writing, and sweep what a killed run left.

    The lock is the kernel's and goes with the process. Raises StoreError where another has it.
    """
    if not create:
        yield
        return
    journal = root / "journal"
    journal.mkdir(parents=True, exist_ok=True)
    with (journal / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StoreError(
                f"another extraction is writing {root}; wait for it, or stop it and run again"
            ) from None
        sweep(root)
        yield
