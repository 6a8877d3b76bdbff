"""`align plan`: bytes, hours and break-even of a feature cache, before any of it is spent."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cli import console
from featcache.object_path import ObjectPath, StorePath

if TYPE_CHECKING:
    from align.plan import Machine, Plan, Rate, Workload

ASSUMED = "assumed"


@console.command("plan")
@click.option("--model", required=True, help="A name from `featcache models`.")
@click.option("--llm", required=True, help="E.g. Qwen/Qwen3-8B-Base, qwen3-8b; a hub id, a folder.")
@click.option("--images", required=True, type=click.IntRange(1), metavar="N", help="In the data.")
@click.option("--epochs", type=click.FloatRange(0, min_open=True), default=1.0, show_default=True)
@click.option(
    "--runs", type=click.IntRange(1), default=1, show_default=True, help="Trainings, same features."
)
@click.option("--codec", default="fp16", show_default=True, help="Of the store: docs/codecs.md.")
@click.option(
    "--visual-tokens",
    type=click.IntRange(1),
    help="Of an image: the resampler's [64], or the encoder's patches for the MLP connector.",
)
@click.option("--text-tokens", type=click.IntRange(1), help="Of a sample, beside those.  [32]")
@click.option("--supervised-tokens", type=click.IntRange(1), help="Learned ones of them.  [20]")
@click.option("--gpus", type=click.IntRange(1), help="Of all machines.  [1]")
@click.option("--gpu-tflops", type=click.FloatRange(0, min_open=True), help="Peak, bf16.  [989]")
@click.option("--mfu-encode", type=click.FloatRange(0, 1, min_open=True), help="Of peak.  [0.4]")
@click.option("--mfu-train", type=click.FloatRange(0, 1, min_open=True), help="Of peak.  [0.35]")
@click.option("--cores", type=click.IntRange(1), help="That decode, in all.  [16 a GPU]")
@click.option(
    "--decode-images-per-s",
    type=click.FloatRange(0, min_open=True),
    help="Of one core: read, decode, resize.  [300, a 640 x 480 JPEG]",
)
@click.option(
    "--disk-gbps",
    type=click.FloatRange(0, min_open=True),
    help="GB/s of the slowest link to the store, in all.  [2]",
)
@click.option("--write-gbps", type=click.FloatRange(0, min_open=True), help="[as --disk-gbps]")
@click.option("--gpu-hour-price", type=click.FloatRange(0), help="Of one GPU; costs are shown.")
@click.option("--disk-price", type=click.FloatRange(0), help="Of a GB for a month.")
@click.option("--months", type=click.FloatRange(0), help="That the store is kept.  [1]")
@click.option(
    "--probe",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    metavar="DIR",
    help="Measure encoding and decoding here, on images of DIR.",
)
@click.option("--device", default="auto", show_default=True, help="Of --probe.")
@click.option("--random-weights", is_flag=True, help="Of --probe; as fast as the real ones.")
@click.option(
    "--features", type=console.LOCATION, metavar="STORE", help="Measure the disk by reading STORE."
)
def plan(
    model: str,
    llm: str,
    images: int,
    epochs: float,
    runs: int,
    codec: str,
    visual_tokens: int | None,
    text_tokens: int | None,
    supervised_tokens: int | None,
    probe: Path | None,
    device: str,
    random_weights: bool,
    features: StorePath | None,
    gpu_hour_price: float | None,
    disk_price: float | None,
    months: float | None,
    **machine: Any,
) -> console.Document:
    """Bytes, hours, cost and break-even of caching features, by arithmetic.

    Says plainly when the cache will not pay. Every number that goes in is marked as given, assumed
    or measured; align/plan.py has the formulas.
    """
    from align.flop import find_language_model
    from align.plan import SUPERVISED_TOKENS, TEXT_TOKENS, Plan, Workload, connector_of

    if gpu_hour_price is None and (disk_price is not None or months is not None):
        raise click.UsageError("--disk-price and --months need --gpu-hour-price")
    entry = _encoder(model)
    text = text_tokens or TEXT_TOKENS
    workload = Workload(
        encoder=entry,
        llm=find_language_model(llm),
        images=images,
        connector=connector_of(visual_tokens, entry.num_patches),
        codec=codec,
        epochs=epochs,
        runs=runs,
        text_tokens=text,
        supervised_tokens=supervised_tokens or min(SUPERVISED_TOKENS, text),
    )
    known = _known(machine)
    if probe is not None:
        known |= _probed(model, probe, device, random_weights, known)
    if features is not None:
        known |= _read(features)
    found = Plan(workload, _machine(known), _prices(gpu_hour_price, disk_price, months))
    given = {"text_tokens": text_tokens, "supervised_tokens": supervised_tokens}
    _show(found, model, known, given)
    return _document(found, model, known, given)


@dataclass(frozen=True, slots=True)
class Known:
    """A number and where it comes from: "given", "assumed: ...", "measured: ..."."""

    value: float
    origin: str


def _encoder(model: str) -> Any:
    """Raises ConfigError for a name that the registry does not have, and for an encoder whose
    features cannot be trained on."""
    from featcache.errors import ConfigError
    from featcache.registry import ENCODERS, same_encoder

    for name, entry in ENCODERS.items():
        if same_encoder(name, model):
            if entry.own_grids:
                raise ConfigError(
                    f"--model {model}: gives each image its own patch grid, and training on such "
                    "features is not supported yet"
                )
            return entry
    near = difflib.get_close_matches(model, ENCODERS, n=3)
    hint = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
    raise ConfigError(f"--model {model}: not known by name; {hint}`featcache models` lists all")


def _known(options: Mapping[str, Any]) -> dict[str, Known]:
    """What is known of the machine before anything is measured, by the names of `Machine`."""
    from align import plan

    gpus = options["gpus"] or 1
    disk = options["disk_gbps"] or plan.DISK_GBPS
    defaults = {
        "gpus": (1, "one"),
        "gpu_tflops": (plan.GPU_TFLOPS, "peak of an H100 or H200, dense bf16"),
        "mfu_encode": (plan.ENCODE_EFFICIENCY, "a usual share of the peak"),
        "mfu_train": (plan.TRAIN_EFFICIENCY, "a usual share of the peak"),
        "cores": (plan.CORES_PER_GPU * gpus, f"{plan.CORES_PER_GPU} a GPU"),
        "decode_images_per_s": (
            plan.DECODE_IMAGES_PER_S,
            "a core of the machine of benchmarks/bench_decode.py, JPEGs of 640 x 480",
        ),
        "disk_gbps": (disk, "one NVMe disk"),
        "write_gbps": (disk, "as fast as it is read"),
    }
    fields = {"mfu_encode": "encode_efficiency", "mfu_train": "train_efficiency"}
    fields |= {"disk_gbps": "read_gbps"}
    known = {}
    for option, (value, why) in defaults.items():
        given = options[option]
        found = Known(value, f"{ASSUMED}: {why}") if given is None else Known(given, "given")
        known[fields.get(option, option)] = found
    return known


def _probed(
    model: str, folder: Path, device: str, random_weights: bool, known: Mapping[str, Known]
) -> dict[str, Known]:
    """What a few seconds' work on real images says of one GPU and one core."""
    from align.probe import encoder_speed

    console.say(f"measuring {model} on images of {folder}")
    speed = encoder_speed(model, folder, device, random_weights)
    where = f"measured: batch {speed.batch_size}, device {device}, images of {folder}"
    found = {"encode_images_per_s": Known(1 / speed.encode_s, where)}
    if known["decode_images_per_s"].origin.startswith(ASSUMED):
        found["decode_images_per_s"] = Known(1 / speed.decode_s, f"measured: images of {folder}")
    return found


def _read(store: StorePath) -> dict[str, Known]:
    """The disk's speed, from a store on it."""
    from align.probe import disk_speed
    from featcache.errors import ConfigError

    if isinstance(store, ObjectPath):
        raise ConfigError(
            f"--features {store}: only a disk is measured; give a bucket's GB/s with --disk-gbps"
        )
    console.say(f"measuring the disk on {store}")
    speed = disk_speed(store)
    how = f"measured: {console.size(speed.nbytes)} at random, {speed.how}"
    return {"read_gbps": Known(speed.gbps, how)}


def _machine(known: Mapping[str, Known]) -> Machine:
    from align.plan import Machine

    return Machine(**{name: each.value for name, each in known.items()})  # type: ignore[arg-type]


def _prices(gpu_hour: float | None, gb_month: float | None, months: float | None) -> Any:
    from align.plan import Prices

    if gpu_hour is None:
        return None
    return Prices(gpu_hour, gb_month or 0.0, 1.0 if months is None else months)


# ---------------------------------------------------------------------------------------- output

LABELS = {
    "gpus": "GPUs",
    "gpu_tflops": "TFLOP/s of a GPU, peak",
    "encode_efficiency": "of that while encoding",
    "train_efficiency": "of that while training",
    "encode_images_per_s": "images/s encoded by a GPU",
    "cores": "cores that decode",
    "decode_images_per_s": "images/s decoded by a core",
    "read_gbps": "GB/s read from the disk",
    "write_gbps": "GB/s written to the disk",
    "text_tokens": "text tokens a sample",
    "supervised_tokens": "supervised ones of them",
}


def _inputs(
    found: Plan, known: Mapping[str, Known], given: Mapping[str, int | None]
) -> dict[str, Known]:
    """All numbers that went in, with their origins."""
    tokens = {
        name: Known(
            getattr(found.workload, name), f"{ASSUMED}: a caption" if value is None else "given"
        )
        for name, value in given.items()
    }
    inputs = dict(known) | tokens
    if "encode_images_per_s" in inputs:
        del inputs["encode_efficiency"]  # not used: the rate itself was measured
    return inputs


def _show(
    found: Plan, model: str, known: Mapping[str, Known], given: Mapping[str, int | None]
) -> None:
    from align.plan import figure

    work = found.workload
    console.table(
        ["goes in", "", "origin"],
        [
            (LABELS[name], figure(each.value, 4),
             each.origin)
            for name, each in _inputs(found, known, given).items()
        ],
        right=(1,),
    )  # fmt: skip
    llm, connector = work.llm_flop / 1e12, work.connector_flop / 1e12
    console.fields(
        {
            "an image": f"{model}: {figure(work.encoder.tflop)} TFLOP, "
            f"{work.encoder.num_patches} x {work.encoder.width} features, "
            f"{console.size(found.image_bytes)} in {work.codec}",
            "a sample": f"{work.llm.name}, {work.visual_tokens} visual and {work.text_tokens} text "
            f"tokens: {figure(llm)} TFLOP forward and backward to the inputs, "
            f"{work.connector.name} {figure(connector)}",
            "at most": f"{figure(found.compute_gain)}x from leaving out the encoder, by operations",
            "store": f"{console.size(found.store_bytes)} in {found.files:,} files, "
            f"{console.count(found.shards, 'shard')}",
            "extraction": f"{_hours(found.extraction_hours)}, {_limited(found.extraction)}; a disk "
            f"of {figure(found.write_gbps_needed, 2)} GB/s and {found.cores_needed:,} cores do not "
            "limit",
            "GPU memory": "unknown"
            if found.freed_bytes is None
            else f"{console.size(found.freed_bytes)} or more not taken by the encoder's weights",
        }
    )
    console.table(
        ["training", "images/s", "limited by", "a run", f"{work.runs} in all, with extraction"],
        [
            ("with the encoder", *_row(found.live, found.live_run_hours, found.live_hours)),
            ("from the cache", *_row(found.cached, found.cached_run_hours, found.cached_hours)),
        ],
        right=(1, 3, 4),
    )
    needed = figure(found.read_gbps_needed, 2)
    console.say(f"from the cache, a disk of {needed} GB/s or more does not limit training")
    if found.live_cost is not None and found.cached_cost is not None:
        console.say(
            f"cost: {found.live_cost:,.2f} with the encoder, {found.cached_cost:,.2f} from the "
            f"cache, {found.storage_cost:,.2f} of it for the disk"
        )
    console.say(f"The cache {found.verdict}.", style="bold")


def _row(rate: Rate, run_hours: float, all_hours: float) -> tuple[str, ...]:
    limit = rate.bottleneck
    return f"{rate.images_per_s:,.0f}", limit, _hours(run_hours), _hours(all_hours)


def _hours(hours: float) -> str:
    seconds = 3600 * hours
    return console.duration(seconds) if seconds >= 0.1 else "under 0.1 s"


def _limited(rate: Rate) -> str:
    return f"{rate.images_per_s:,.0f} images/s, limited by {rate.bottleneck}"


def _document(
    found: Plan, model: str, known: Mapping[str, Known], given: Mapping[str, int | None]
) -> console.Document:
    work: Workload = found.workload
    document = {
        "model": model,
        "llm": asdict(work.llm),
        "images": work.images,
        "epochs": work.epochs,
        "runs": work.runs,
        "codec": work.codec,
        "connector": work.connector.name,
        "visual_tokens": work.visual_tokens,
        "inputs": {name: asdict(each) for name, each in _inputs(found, known, given).items()},
        "tflop": {
            "encoder": work.encode_flop / 1e12,
            "llm": work.llm_flop / 1e12,
            "connector": work.connector_flop / 1e12,
        },
        "bytes_per_image": found.image_bytes,
        "store_bytes": found.store_bytes,
        "shards": found.shards,
        "files": found.files,
        "compute_gain": found.compute_gain,
        "extraction": _rate(found.extraction)
        | {
            "hours": found.extraction_hours,
            "write_gbps_needed": found.write_gbps_needed,
            "cores_needed": found.cores_needed,
        },
        "live": _rate(found.live)
        | {"run_hours": found.live_run_hours, "hours": found.live_hours, "cost": found.live_cost},
        "cached": _rate(found.cached)
        | {
            "run_hours": found.cached_run_hours,
            "hours": found.cached_hours,
            "cost": found.cached_cost,
            "read_gbps_needed": found.read_gbps_needed,
        },
        "gain": found.gain,
        "break_even_runs": found.break_even_runs,
        "break_even_epochs": found.break_even_epochs,
        "freed_gpu_bytes": found.freed_bytes,
        "pays": found.pays,
        "verdict": f"The cache {found.verdict}.",
    }
    if found.prices is not None:
        document["prices"] = asdict(found.prices)
    return document


def _rate(rate: Rate) -> dict[str, Any]:
    return {
        "images_per_s": rate.images_per_s,
        "limited_by": rate.bottleneck,
        "limits": dict(rate.limits),
    }
