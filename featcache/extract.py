"""Images -> features -> store: scan, plan, encode shard by shard, commit, compile the index.

What decides the bytes of a shard is fixed before work starts (the plan, and the batch
boundaries within each shard), so they do not depend on kills, reruns or the number of workers.

RAM: what featcache/encode.py states, whatever the number of images, and about 150 bytes an image
for the plan.
"""

from __future__ import annotations

import fcntl
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from featcache.codecs import Codec, get_codec
from featcache.encode import ShardEncoder
from featcache.encoders import Encoder, load_encoder
from featcache.errors import StoreError
from featcache.files import publish_json, sweep
from featcache.fingerprint import fingerprint, require_same
from featcache.index import Index, Plan, compile_index, load_plans, write_group
from featcache.layout import ShardGeometry, Status, StoreInfo, array_metadata, features_path
from featcache.manifests import Manifest, read_manifest
from featcache.planning import plan_extraction
from featcache.writer import Commit, write_error

DEFAULT_BATCH_SIZE = {"cuda": 64, "cpu": 16}


@dataclass(frozen=True, slots=True)
class ExtractOptions:
    """What to extract, and how. Defaults are the command line's.

    model: registered name, hub id or folder. data, image_root: see `read_manifest`.
    layers: stored outputs, see `Encoder`. batch_size: images per forward; None chooses by device.
    shard_images: rows a shard. workers: decoding threads. limit: only the first images.
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
    shard_images: int = 128
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

    images: distinct image keys of the data; features: those with features; new: images encoded by
    this run; failures: {reason: count}; nbytes: of the store's features for all planned rows.
    ok: the failures are within what was allowed, and none is an overflow of the codec.
    """

    path: Path
    images: int
    features: int
    new: int
    failures: dict[str, int]
    skipped_records: int
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
    encoder = load_encoder(
        options.model,
        layers=options.layers,
        device=options.device,
        random_weights=options.random_weights,
    )
    info = _describe(encoder, codec, options, manifest)
    with _locked(options.out, create=not options.dry_run):
        plans = load_plans(options.out)
        on_progress(ExtractProgress("scan", 0, len(keys)))
        status = Index.load(options.out, info).status if info.index else np.zeros(0, np.uint8)
        plan = plan_extraction(
            plans,
            status,
            keys,
            manifest.image_root,
            options.shard_images,
            options.workers,
            lambda done: on_progress(ExtractProgress("scan", done, len(keys))),
        )
        plans = [*plans, plan] if plan else plans
        pending = [
            (each, shard)
            for each in plans
            for shard in each.shards
            if Commit.load(options.out, shard) is None
        ]
        geometry = ShardGeometry(
            options.shard_images, info.num_patches * info.width * codec.itemsize
        )
        shard_bytes = geometry.images * geometry.pitch_bytes + geometry.index_bytes
        needed = len(pending) * shard_bytes * len(info.layers)
        free = _require_space(options, needed)
        new = sum(len(each.digests_of(shard)) for each, shard in pending)
        failures: Counter[str] = Counter()
        if not options.dry_run:
            try:
                prepare_store(options.out, info, codec, plans, plan)
            except OSError as error:
                raise write_error(options.out, error) from error
            with ShardEncoder(
                options.out,
                encoder,
                codec,
                geometry,
                manifest.image_root,
                info.fingerprint["compute"]["batch_size"],
                options.workers,
            ) as work:
                on_progress(ExtractProgress("encode", 0, new))
                for done, failed in work.run(pending):
                    on_progress(ExtractProgress("encode", done, new, failed, work.seconds))
            try:
                compile_index(options.out, info)
            except OSError as error:
                raise write_error(options.out, error) from error
            index = Index.load(options.out, info)
            rows = index.find(keys)
            failures = Counter(
                index.failures[key].reason for key, row in zip(keys, rows, strict=True) if row < 0
            )
    failed = sum(failures.values())
    return ExtractResult(
        path=options.out,
        images=len(keys),
        features=len(keys) - failed,
        new=new,
        failures=dict(failures),
        skipped_records=len(manifest.skipped),
        nbytes=needed,
        free_bytes=free,
        seconds=time.monotonic() - start,
        ok=failed <= options.max_failures * len(keys) and not failures[Status.OVERFLOW.reason],
    )


def _describe(
    encoder: Encoder, codec: Codec, options: ExtractOptions, manifest: Manifest
) -> StoreInfo:
    """The description of the store to be, checked against the one that is there.

    Raises StoreError, FingerprintMismatch.
    """
    info = StoreInfo(
        fingerprint=fingerprint(encoder),
        codec=codec.name,
        layers=list(encoder.layers),
        num_patches=encoder.num_patches,
        width=encoder.width,
        shard_images=options.shard_images,
        pooled=encoder.model.use_head,
        source={
            "data": [str(path.absolute()) for path in manifest.files],
            "images": str(manifest.image_root.absolute()),
        },
    )
    compute = info.fingerprint["compute"]
    compute["batch_size"] = options.batch_size or DEFAULT_BATCH_SIZE[encoder.device.type]
    if not (options.out / "zarr.json").exists():
        if options.out.exists() and any(
            path for path in options.out.iterdir() if path.name != "journal"
        ):
            raise StoreError(
                f"{options.out} exists and is no feature store; choose another --out or remove it"
            )
        return info
    there = StoreInfo.load(options.out)
    if options.batch_size is None:
        # The last bits of a feature may depend on the batch it was computed in.
        compute["batch_size"] = there.fingerprint["compute"]["batch_size"]
    require_same(
        {**there.fingerprint, "codec": there.codec},
        {**info.fingerprint, "codec": info.codec},
        left_name=str(options.out),
        right_name="this command",
        cure="choose another --out, or the options that the store was made with",
    )
    info.index = there.index
    return info


def prepare_store(
    root: Path, info: StoreInfo, codec: Codec, plans: Sequence[Plan], new: Plan | None
) -> None:
    """Everything that must be in place before the first shard: metadata, then the plan."""
    rows = max(plan.end_row for plan in plans)
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
    info.save(root)
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
    try:
        journal.mkdir(parents=True, exist_ok=True)
        lock = (journal / "lock").open("w")
    except OSError as error:
        raise write_error(root, error) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StoreError(
                f"another extraction is writing {root}; wait for it, or stop it and run again"
            ) from None
        sweep(root)
        yield
