"""Images -> features -> store: scan, plan, encode shard by shard, commit, compile the index.

What decides the bytes of a shard is fixed before work starts (the plan, and the batch
boundaries within each shard), so they do not depend on kills, reruns or the number of workers.

RAM: what featcache/worker.py states for each worker, and in the process that plans about 2 KB a
record while the data files are read and planned: 1.2 GB for 558K images.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from featcache import layout
from featcache.codecs import Codec, LayerCodec, get_codec
from featcache.device import num_cores
from featcache.encoders import Encoder
from featcache.errors import ConfigError, ManifestError, StoreError
from featcache.executors import Executor, open_executor
from featcache.executors.ranks import Rank, RankExecutor, Speaker, listen, rank_from
from featcache.files import publish, publish_json
from featcache.fingerprint import require_same
from featcache.index import Index, compile_index, is_current, remove_old
from featcache.journal import Failure, Journal, Plan, locked, merge, num_rows
from featcache.layout import (
    Status,
    StoreInfo,
    array_checksum,
    array_metadata,
    features_path,
    write_array,
)
from featcache.manifests import Manifest, read_manifest
from featcache.mend import Records
from featcache.object_path import ObjectPath, StorePath
from featcache.planning import plan_extraction
from featcache.probe import Speed
from featcache.sources import Sources
from featcache.store import blank_spec
from featcache.tasks import PendingTasks
from featcache.tiles import Grid, Tiling, tiles_of_all, with_tiles
from featcache.worker import EncoderInfo, WorkerOptions, WorkProgress
from featcache.writer import write_error

DEFAULT_BATCH_SIZE = {"cuda": 64, "cpu": 16}
DEFAULT_SHARD_IMAGES = 128
DEFAULT_SHARD_BYTES = 1 << 30
"""Of a shard's features at the most, where nothing else is asked for: a ConvNeXt's are 106 MB an
image, and shards are filled in memory."""
PROBED_BATCHES = 16
"""Of at least so many batches, a few seconds are spent to tell how long all of them will take."""
BOOKKEEPING_BYTES_PER_ROW = 1024
"""Of plan, commit record and index, each with its second copy or its successor; 0.5 KB measured."""


@dataclass(frozen=True, slots=True)
class ExtractOptions:
    """What to extract, and how. Defaults are the command line's.

    model: registered name, hub id or folder. data, image_root: see `read_manifest`.
    layers: stored outputs, see `Encoder`. batch_size: images per forward; None chooses by device.
    shard_images: rows a shard; None takes the store's, 128 for a new one.
    executor, workers: see `open_executor`. decode_threads: of each worker that decode images; None
    takes a core's worth each. limit: only the first images. tiles: grids that images are cut into
    besides (featcache/tiles.py); none where empty.
    max_failures: ratio of images without features above which the result is not ok.
    force: begin although the disk seems too small.
    fit, compile: see `load_encoder`. load: in its place, for benchmarks.
    """

    model: str
    data: tuple[StorePath, ...]
    out: StorePath
    image_root: StorePath | None = None
    layers: tuple[str, ...] = ("-2",)
    codec: str = "fp16"
    batch_size: int | None = None
    device: str = "cpu"
    shard_images: int | None = None
    executor: str = "local"
    workers: int | None = None
    decode_threads: int | None = None
    limit: int | None = None
    tiles: tuple[Grid, ...] = ()
    max_failures: float = 0.01
    random_weights: bool = False
    dry_run: bool = False
    force: bool = False
    fit: str = "checkpoint"
    compile: bool = False
    load: Callable[..., Encoder] | None = None


@dataclass(frozen=True, slots=True)
class Preflight:
    """What an extraction is about to take.

    images: to encode, tiles included; nbytes: that it adds; free_bytes: where the store is or
    will be, None in a bucket, which has no end.
    speed: of one worker at a few images, None where there are too few to tell or none can be read.
    workers: how many there are.
    """

    images: int
    nbytes: int
    free_bytes: int | None
    speed: Speed | None
    workers: int = 1

    @property
    def seconds(self) -> float | None:
        """For all of them, at that speed of each worker."""
        if self.speed is None:
            return None
        return self.images / self.speed.images_per_s / self.workers


@dataclass(frozen=True, slots=True)
class ExtractProgress:
    """A snapshot for display; each stage begins with one of done = 0.

    stage: "scan" (hashing image files) or "encode". work: of all workers, so far.
    preflight: with the first one of "encode".
    """

    stage: str
    done: int
    total: int
    work: WorkProgress = field(default_factory=WorkProgress)
    preflight: Preflight | None = None


@dataclass(frozen=True, slots=True)
class ExtractResult:
    """What an extraction came to.

    images: distinct image keys of the data; features: those with features, of all their tiles too
    (in a dry run, those whose file can be read); new: images and tiles encoded by this run;
    failures: {reason: count};
    first_failure: of the first image in the data's order that has none;
    skipped: {reason: (count, the first one's file and line)} of records that cannot be used;
    preflight: what was expected before the first image. work: what the workers did, in
    encoding_s seconds from the first task to the last commit record.
    ok: the failures are within what was allowed, and none is an overflow of the codec.
    """

    path: StorePath
    images: int
    features: int
    new: int
    failures: dict[str, int]
    first_failure: Failure | None
    skipped: dict[str, tuple[int, str]]
    preflight: Preflight
    seconds: float
    encoding_s: float
    work: WorkProgress
    ok: bool


OnProgress = Callable[[ExtractProgress], None]


def extract(options: ExtractOptions, on_progress: OnProgress = lambda _: None) -> ExtractResult:
    """Bring the store at `options.out` up to date with the data; run again after any stop.

    Under torchrun or srun rank 0 does so, with the others' help: they call `assist`.

    Raises ManifestError, EncoderError, ConfigError, StoreError (another extraction is running,
    the disk is full or too small), FingerprintMismatch (the store was made by other means).
    """
    start = time.monotonic()
    rank = launched_as(options)
    require_ours(options.out)
    if rank is None or options.dry_run:
        result = _extract(options, rank, None, on_progress)
    else:
        try:
            with Speaker(options.out, rank) as speaker:
                result = _extract(options, rank, speaker, on_progress)
        except OSError as error:
            raise write_error(options.out, error) from error
    return replace(result, seconds=time.monotonic() - start)


def launched_as(options: ExtractOptions) -> Rank | None:
    """Which rank of torchrun or srun this process is. Raises ConfigError for options that would
    multiply the workers."""
    if options.executor != "local":
        return None  # `srun ray symmetric-run` leaves srun's variables to the driver
    rank = rank_from(os.environ)
    if rank is not None and options.workers not in (None, 1):
        raise ConfigError(f"this is {rank}: the launcher starts the workers; leave out --workers")
    return rank


def _extract(
    options: ExtractOptions, rank: Rank | None, speaker: Speaker | None, on_progress: OnProgress
) -> ExtractResult:
    codec = get_codec(options.codec)
    manifest = read_manifest(options.data, options.image_root)
    keys = manifest.image_keys()[: options.limit]
    if not keys:
        raise ManifestError(f"{manifest.files[0]}: no record names an image; nothing to extract")
    # Only the keys are needed from here on; 558K records with their texts are most of a GB.
    manifest.records.clear()
    worker = _worker_options(options)
    with (
        open_executor(options.executor, options.workers, worker)
        if rank is None
        else RankExecutor(worker, rank, speaker) as executor
    ):
        encoder = executor.describe()
        try:
            with contextlib.nullcontext() if options.dry_run else locked(options.out):
                return _update(options, executor, encoder, codec, manifest, keys, on_progress)
        except OSError as error:
            raise write_error(options.out, error) from error


def assist(
    options: ExtractOptions,
    rank: Rank,
    on_progress: OnProgress = lambda _: None,
    on_wait: Callable[[], None] = lambda: None,
) -> WorkProgress:
    """What the ranks other than 0 do: wait for rank 0's plan, then encode until all is committed.

    on_wait: called while waiting. Returns what this rank did.
    Raises as `extract`, and StoreError where rank 0 gave up.
    """
    out = options.out
    require_ours(out)
    with RankExecutor(_worker_options(options), rank) as executor:
        try:
            word = listen(out, rank, on_wait)
            info = StoreInfo.load(out)
            ours = executor.describe().fingerprint
            require_same(
                info.fingerprint,
                with_tiles(ours, Tiling.for_encoder(options.tiles, ours)),
                left_name=str(out),
                right_name=str(rank),
                cure="run the same command with the same versions on every rank",
            )
            journal = Journal.load(out, word.generation)
            tasks = _tasks(out, info, journal, journal.plans, journal.pending, word.image_root)
            total = sum(tasks.images)
            work = WorkProgress()
            with contextlib.closing(executor.run(tasks)) as running:
                for work in running:
                    on_progress(ExtractProgress("encode", work.done, total, work))
        except OSError as error:
            raise write_error(out, error) from error
    return work


def _worker_options(options: ExtractOptions) -> WorkerOptions:
    return WorkerOptions(
        out=options.out,
        model=options.model,
        layers=options.layers,
        device=options.device,
        random_weights=options.random_weights,
        fit=options.fit,
        compile=options.compile,
        load=options.load,
        decode_threads=options.decode_threads,
    )


def _update(
    options: ExtractOptions,
    executor: Executor,
    encoder: EncoderInfo,
    codec: Codec,
    manifest: Manifest,
    keys: list[str],
    on_progress: OnProgress,
) -> ExtractResult:
    """Plan, encode and commit into a locked store; in a dry run only plan. Raises as `extract`."""
    out, root = options.out, str(manifest.image_root.absolute())
    tiling = Tiling.for_encoder(options.tiles, encoder.fingerprint)
    info = _describe(encoder, tiling, codec, options, manifest)
    journal = Journal.load(out, info.generation)
    on_progress(ExtractProgress("scan", 0, len(keys)))
    plan = plan_extraction(
        journal,
        keys,
        root,
        info.shard_images,
        options.batch_size or DEFAULT_BATCH_SIZE[encoder.device],
        options.decode_threads or num_cores(),
        lambda done: on_progress(ExtractProgress("scan", done, len(keys))),
        tiling,
    )
    plans, pending = list(journal.plans), list(journal.pending)
    if plan:
        plans.append(plan)
        pending += [(plan, shard) for shard in plan.shards]
    tasks = _tasks(out, info, journal, plans, pending, root)
    new = sum(tasks.images)
    blank = blank_spec(info)
    nbytes = sum(map(blank.bytes_of, tasks.images)) + new * BOOKKEEPING_BYTES_PER_ROW
    free_bytes = require_space(
        options.out,
        nbytes,
        "choose another --out or --codec, take fewer images with --limit, or begin all the same "
        "with --force",
        force=options.force,
    )
    speed = None
    batch_size = pending[0][0].batch_size if pending else 0
    if new > (0 if options.dry_run else PROBED_BATCHES * batch_size):
        first = [image.refs[0] for image in tasks[0].images]
        speed = executor.probe(first, batch_size)
    preflight = Preflight(new, nbytes, free_bytes, speed, executor.workers)

    work, encoding_s = WorkProgress(), 0.0
    if options.dry_run:
        missing = merge(plans).missing
        lost = [missing[key] for key in keys if key in missing]
    else:
        prepare_store(out, info, codec, plans, plan)
        on_progress(ExtractProgress("encode", 0, new, preflight=preflight))
        if pending and codec.scaled:
            _calibrate(out, info, executor, root)
        if isinstance(executor, RankExecutor) and executor.speaker is not None:
            executor.speaker.ready(plans[-1].generation if plans else 0, root)
        began = time.monotonic()
        while tasks:
            # In one go; again where a rank that was lost took a shard's record with it.
            with contextlib.closing(executor.run(tasks)) as running:
                for work in running:
                    on_progress(ExtractProgress("encode", work.done, new, work))
            journal = Journal.load(out, info.generation)
            tasks = _tasks(out, info, journal, plans, journal.pending, root)
        encoding_s = time.monotonic() - began if pending else 0.0
        if plan and not pending:
            journal = Journal.load(out, info.generation)
        if plan or pending or not is_current(out, info, journal):
            compile_index(out, info, journal)
        remove_old(out, info)
        index = Index.load(out, info)
        lost = _without_features(index, keys, tiling)
    failures = Counter(failure.reason for failure in lost)
    skipped = Counter(record.reason for record in manifest.skipped)
    first_of = {record.reason: record.origin for record in reversed(manifest.skipped)}
    return ExtractResult(
        path=out,
        images=len(keys),
        features=len(keys) - len(lost),
        new=new,
        failures=dict(failures),
        first_failure=lost[0] if lost else None,
        skipped={reason: (count, first_of[reason]) for reason, count in skipped.items()},
        preflight=preflight,
        seconds=0.0,
        encoding_s=encoding_s,
        work=work,
        ok=len(lost) <= options.max_failures * len(keys) and not failures[Status.OVERFLOW.reason],
    )


def _without_features(index: Index, keys: Sequence[str], tiling: Tiling | None) -> list[Failure]:
    """Why images have no features: one for each that lacks its own or those of a tile."""
    rows = index.find(keys)
    if tiling is None:
        return [index.failures[keys[i]] for i in np.flatnonzero(rows < 0).tolist()]
    there = np.flatnonzero(rows >= 0).tolist()
    sizes = index.sizes[rows[there]].tolist()
    tiles, counts = tiles_of_all(tiling, [keys[i] for i in there], sizes)
    image_of_tile = np.repeat(there, counts)
    lost = {i: keys[i] for i in np.flatnonzero(rows < 0).tolist()}
    for at in np.flatnonzero(index.find(tiles) < 0).tolist():
        lost.setdefault(int(image_of_tile[at]), tiles[at])
    return [index.failures[lost[i]] for i in sorted(lost)]


def _tasks(
    out: StorePath,
    info: StoreInfo,
    journal: Journal,
    plans: Sequence[Plan],
    pending: list[tuple[Plan, int]],
    image_root: str,
) -> PendingTasks:
    sources, records = Sources(plans, image_root), Records(out, info, plans)
    return PendingTasks(pending, sources, records, journal.recorded)


def require_ours(out: StorePath) -> None:
    """Raises ConfigError where no store can have that name, StoreError where `out` is something
    else than a store, whole or begun."""
    if isinstance(out, ObjectPath) and not out.key:
        raise ConfigError(f"--out {out}: a store needs a name in its bucket: {out}/store.zarr")
    if out.suffix.lower() in layout.HDF5_SUFFIXES and not out.is_dir():
        raise ConfigError(
            f"--out {out}: extract writes Zarr; name it {str(out)[: -len(out.suffix)]}.zarr "
            "and make an HDF5 file of it with `featcache convert` afterwards"
        )
    if not out.exists():
        return
    if not out.is_dir():
        raise StoreError(f"{out} is a file; choose another --out")
    if (out / "zarr.json").exists() and not (out / "journal").exists():
        StoreInfo.load(out)  # another Zarr group, perhaps: no lock is put into it
    begun = (out / "zarr.json").exists() or (out / "journal" / "lock").exists()
    ours = begun or (out / layout.JOBS).is_dir()
    if not ours and any(out.iterdir()):
        raise StoreError(f"{out} exists and is no feature store; choose another --out or remove it")


def _describe(
    encoder: EncoderInfo,
    tiling: Tiling | None,
    codec: Codec,
    options: ExtractOptions,
    manifest: Manifest,
) -> StoreInfo:
    """The description of the store to be: that of the one there, where it is of the same making.

    Raises StoreError, FingerprintMismatch, ConfigError.
    """
    info = StoreInfo(
        fingerprint=with_tiles(encoder.fingerprint, tiling),
        codec=codec.name,
        layers=list(encoder.layers),
        num_patches=encoder.num_patches,
        width=encoder.width,
        shard_images=options.shard_images or default_shard_images(encoder, codec),
        pooled=encoder.pooled,
    )
    # Wherever a store was begun: what says how its features were made may be lost.
    begun = ("zarr.json", layout.copy_path("zarr.json"), layout.plan_path(1))
    if any((options.out / path).exists() for path in begun):
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
        **info.source,  # how the codes of a converted store were made
        "data": [str(path.absolute()) for path in manifest.files],
        "images": str(manifest.image_root.absolute()),
    }
    return info


def default_shard_images(encoder: EncoderInfo, codec: Codec) -> int:
    """As many as `DEFAULT_SHARD_BYTES` hold, and no more than `DEFAULT_SHARD_IMAGES`."""
    layer = LayerCodec(codec, encoder.num_patches, encoder.width)
    image_bytes = layer.image_bytes * len(encoder.layers)
    return max(1, min(DEFAULT_SHARD_IMAGES, DEFAULT_SHARD_BYTES // image_bytes))


def prepare_store(
    root: StorePath, info: StoreInfo, codec: Codec, plans: Sequence[Plan], new: Plan | None
) -> None:
    """Everything that must be in place before the first shard. The root's metadata come first:
    by them a begun store is known as one. Then the plan: where another job planned something else
    meanwhile, nothing of ours comes after that. Raises OSError, StoreError."""
    info.save(root)
    if new:
        new.save(root)
    for path, document in metadata(info, codec, num_rows(plans)).items():
        publish_json(root / path, document)
    for plan in plans:  # a run may have been stopped between a plan and its second copy
        path = layout.plan_path(plan.generation)
        if not (root / layout.copy_path(path)).exists():
            publish(root / layout.copy_path(path), [(root / path).read_bytes()])


def metadata(info: StoreInfo, codec: Codec, rows: int) -> dict[str, Any]:
    """{path: document} of the zarr.json of every group, and of every array that grows with the
    store."""
    shards = -(-rows // info.shard_images)
    patches, width = info.num_patches, info.width
    codes = (patches, codec.code_width(width))
    found: dict[str, Any] = {"features/zarr.json": layout.group_metadata()}
    for layer in info.layers:
        found[f"{features_path(layer)}/zarr.json"] = array_metadata(
            (rows, *codes),
            codec.zarr_dtype,
            chunk=(info.shard_images, *codes),
            inner_chunk=(1, *codes),
            # A row without features reads as NaN, never as zeros.
            fill_value=codec.fill_value,
        )
    if codec.scaled:
        found["scales/zarr.json"] = found["channels/zarr.json"] = layout.group_metadata()
        for layer in info.layers:
            found[f"scales/{layer}/zarr.json"] = array_metadata(
                (rows, patches), "float32", chunk=(info.shard_images, patches), fill_value="NaN"
            )
    if info.pooled:
        found["pooled/zarr.json"] = array_metadata(
            (rows, width),
            str(codec.pooled_dtype).removeprefix("torch."),
            chunk=(info.shard_images, width),
            fill_value="NaN",
        )
    # An array, so that tools that walk the hierarchy do not look into its folder.
    found["journal/zarr.json"] = array_metadata((shards,), "uint8", chunk=(max(1, shards),))
    return found


def _calibrate(root: StorePath, info: StoreInfo, executor: Executor, image_root: str) -> None:
    """Measure the channel values of a scaled codec, once in a store's life: when there is an image
    to measure them on. Raises OSError."""
    paths = {layer: layout.channels_path(layer) for layer in info.layers}
    if all(path in info.checksums for path in paths.values()):
        return
    for layer, channels in executor.calibrate(image_root).items():
        write_channels(root, info, layer, torch.from_numpy(np.array(channels)))
    info.save(root)


def write_channels(root: StorePath, info: StoreInfo, layer: str, channels: Tensor) -> None:
    """Publish a layer's channel values, twice, and note their checksum. Raises OSError."""
    path = layout.channels_path(layer)
    write_array(root / layout.copy_path(path), channels.numpy())
    write_array(root / path, channels.numpy())
    info.checksums[path] = array_checksum(channels.numpy())


def require_space(out: StorePath, needed: int, cure: str, *, force: bool = False) -> int | None:
    """Free bytes where `out` is or will be, None in a bucket. cure: what else can be done
    than to free some space.

    Raises StoreError where `needed` bytes do not fit, unless forced.
    """
    if isinstance(out, ObjectPath):
        return None
    place = out.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if needed > free and not force:
        raise StoreError(
            f"{out} needs {needed / 1e9:.1f} GB more and {place} has {free / 1e9:.1f} GB free; "
            f"free some space, {cure}"
        )
    return free
