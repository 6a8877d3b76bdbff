"""What a feature cache takes and gives, by arithmetic, before any of it is spent.

Everything is per image, and a sample has one image. With E the encoder's operations an image, T
those of a training step a sample (align/flop.py), G GPUs of F operations a second, of which a
fraction e is reached while encoding and t while training, c CPU cores that decode d images a second
each, and b stored bytes an image that a disk reads at r and writes at w bytes a second:

    extraction      min(G F e / E,  c d,  w / b_padded)         images/s
    live training   min(G / (E / F e + T / F t),  c d)
    cached training min(G F t / T,  r / b)
    hours           images x epochs / rate
    break-even      (1 / extraction) / (1 / live - 1 / cached)    epochs, of all runs together

So where GPUs limit everything, break-even is at one epoch, however fast they are.

In favour of living without a cache: an image's file is taken to be read in no time, and no epoch to
find features in the page cache. In favour of the cache: decoding the stored codec on the GPU is
taken to be free. Of both: GPUs scale evenly, whatever can overlap does, and the optimizer's step is
free. Operations that are not matrix products are in the efficiencies e and t.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from align.connectors import ConnectorConfig
from align.connectors.mlp import MlpConfig
from align.connectors.resampler import ResamplerConfig
from align.flop import LanguageModel, connector_step_flop
from featcache.codecs import LayerCodec, get_codec
from featcache.errors import ConfigError
from featcache.registry import EncoderEntry
from featcache.writer import ShardSpec

TEXT_TOKENS = 32
SUPERVISED_TOKENS = 20
"""Of a caption's sample: 12 tokens of prompt and template, 20 that are learned."""
GPU_TFLOPS = 989.0
"""Peak of an H100 SXM or H200 in dense bf16. Source: NVIDIA's data sheet."""
ENCODE_EFFICIENCY = 0.4
TRAIN_EFFICIENCY = 0.35
"""Of the peak; what frozen towers and short samples in plain PyTorch commonly reach."""
CORES_PER_GPU = 16
DISK_GBPS = 2.0
"""One NVMe disk of a cloud machine: O_DIRECT read 2.1 GB/s at random (docs/performance.md)."""
DECODE_IMAGES_PER_S = 300.0
"""Of a core: reading, decoding and resizing a JPEG of 640 x 480 (benchmarks/bench_decode.py)."""


@dataclass(frozen=True, slots=True)
class Workload:
    """What is to be computed.

    images: in the data, one a sample. connector: what stands between. codec: of the store.
    epochs: of one run. runs: trainings over the same features, e.g. connector ablations.
    text_tokens: of a sample beside the visual ones. supervised_tokens: learned ones of them.
    shard_images: rows a shard.
    """

    encoder: EncoderEntry
    llm: LanguageModel
    images: int
    connector: ConnectorConfig = field(default_factory=ResamplerConfig)
    codec: str = "fp16"
    epochs: float = 1.0
    runs: int = 1
    text_tokens: int = TEXT_TOKENS
    supervised_tokens: int = SUPERVISED_TOKENS
    shard_images: int = 128

    def __post_init__(self) -> None:
        """Raises ConfigError, also for a codec that cannot store the encoder's width."""
        get_codec(self.codec).code_width(self.encoder.width)
        if self.supervised_tokens > self.text_tokens:
            raise ConfigError(
                f"--supervised-tokens {self.supervised_tokens}: more than the sample's "
                f"{self.text_tokens} text tokens; raise --text-tokens"
            )

    @property
    def visual_tokens(self) -> int:
        """Q."""
        if isinstance(self.connector, ResamplerConfig):
            return self.connector.num_latents
        return self.encoder.num_patches

    @property
    def encode_flop(self) -> float:
        """Of the encoder for an image."""
        return self.encoder.tflop * 1e12

    @property
    def llm_flop(self) -> float:
        """Of the frozen language model for a sample, forward and backward to its inputs."""
        tokens = self.visual_tokens + self.text_tokens
        return self.llm.frozen_step_flop(tokens, self.supervised_tokens)

    @property
    def connector_flop(self) -> float:
        """Of the connector for an image, forward and backward."""
        encoder = self.encoder
        tower = (encoder.num_patches, encoder.width)
        return connector_step_flop(self.connector, [tower], self.llm.hidden_size)

    @property
    def spec(self) -> ShardSpec:
        """What the store's shards are made of: one layer, and the encoder's pooled output."""
        codec = get_codec(self.codec)
        layer = LayerCodec(codec, self.encoder.num_patches, self.encoder.width)
        return ShardSpec(self.shard_images, {"-2": layer}, codec.pooled_dtype, self.encoder.width)


def connector_of(visual_tokens: int | None, num_patches: int) -> ConnectorConfig:
    """The connector that makes so many tokens of an image: the resampler, with 64 where None is
    given; the MLP where every patch becomes one."""
    if visual_tokens == num_patches:
        return MlpConfig()
    return (
        ResamplerConfig() if visual_tokens is None else ResamplerConfig(num_latents=visual_tokens)
    )


@dataclass(frozen=True, slots=True)
class Machine:
    """What it is computed with, all machines together.

    gpu_tflops: peak of one GPU. encode_efficiency, train_efficiency: of that peak.
    encode_images_per_s: measured for one GPU; takes the place of peak and efficiency.
    cores: that decode. decode_images_per_s: of one core. read_gbps, write_gbps: GB/s of the slowest
    link between GPUs and store, disk or network.
    """

    gpus: int = 1
    gpu_tflops: float = GPU_TFLOPS
    encode_efficiency: float = ENCODE_EFFICIENCY
    train_efficiency: float = TRAIN_EFFICIENCY
    encode_images_per_s: float | None = None
    cores: int = CORES_PER_GPU
    decode_images_per_s: float = DECODE_IMAGES_PER_S
    read_gbps: float = DISK_GBPS
    write_gbps: float = DISK_GBPS

    def encode_s(self, flop: float) -> float:
        """One GPU's seconds for an image of so many operations."""
        if self.encode_images_per_s is not None:
            return 1 / self.encode_images_per_s
        return flop / (self.gpu_tflops * 1e12 * self.encode_efficiency)

    def train_s(self, flop: float) -> float:
        """One GPU's seconds for a training step's operations."""
        return flop / (self.gpu_tflops * 1e12 * self.train_efficiency)


@dataclass(frozen=True, slots=True)
class Prices:
    """In one currency. gpu_hour: of one GPU. gb_month: of stored features; months: kept so long."""

    gpu_hour: float
    gb_month: float = 0.0
    months: float = 1.0


@dataclass(frozen=True, slots=True)
class Rate:
    """Images a second. limits: what each part would allow by itself, by its name."""

    limits: Mapping[str, float]

    @property
    def bottleneck(self) -> str:
        """The slowest part."""
        return min(self.limits, key=lambda part: self.limits[part])

    @property
    def images_per_s(self) -> float:
        return self.limits[self.bottleneck]


@dataclass(frozen=True, slots=True)
class Plan:
    """What comes of a workload on a machine."""

    workload: Workload
    machine: Machine
    prices: Prices | None = None

    # ------------------------------------------------------------------------------- the store

    @property
    def image_bytes(self) -> int:
        """Of one image's features as a training reads them, without padding and pooled output."""
        return sum(layer.image_bytes for layer in self.workload.spec.layers.values())

    @property
    def shards(self) -> int:
        return math.ceil(self.workload.images / self.workload.shard_images)

    @property
    def store_bytes(self) -> int:
        """Of the shards' data files, with padding and pooled output. Plans, records and the index
        add less than 1 KB an image."""
        spec, images = self.workload.spec, self.workload.images
        full, rest = divmod(images, spec.images)
        return full * spec.shard_bytes + (spec.bytes_of(rest) if rest else 0)

    @property
    def files(self) -> int:
        """Of all shards: features, scales of a scaled codec, pooled output, commit record."""
        scaled = get_codec(self.workload.codec).scaled
        return self.shards * (4 if scaled else 3)

    # ------------------------------------------------------------------------------- rates

    @property
    def extraction(self) -> Rate:
        padded = self.workload.spec.shard_bytes / self.workload.shard_images
        return Rate(
            {
                "encoder": self.machine.gpus / self.machine.encode_s(self.workload.encode_flop),
                "image decoding": self._decoding,
                "disk writes": self.machine.write_gbps * 1e9 / padded,
            }
        )

    @property
    def live(self) -> Rate:
        """Training with the encoder in the loop."""
        step_s = self.machine.encode_s(self.workload.encode_flop) + self._train_s
        return Rate({"GPU": self.machine.gpus / step_s, "image decoding": self._decoding})

    @property
    def cached(self) -> Rate:
        """Training from the store."""
        return Rate(
            {
                "GPU": self.machine.gpus / self._train_s,
                "disk reads": self.machine.read_gbps * 1e9 / self.image_bytes,
            }
        )

    @property
    def _decoding(self) -> float:
        return self.machine.cores * self.machine.decode_images_per_s

    @property
    def _train_s(self) -> float:
        return self.machine.train_s(self.workload.llm_flop + self.workload.connector_flop)

    @property
    def compute_gain(self) -> float:
        """The most that leaving out the encoder can give, by operations alone."""
        return 1 + self.workload.encode_flop / self.workload.llm_flop

    @property
    def gain(self) -> float:
        """Of one run: the cached rate over the live one."""
        return self.cached.images_per_s / self.live.images_per_s

    @property
    def read_gbps_needed(self) -> float:
        """From which on the disk does not limit cached training."""
        return self.cached.limits["GPU"] * self.image_bytes / 1e9

    @property
    def write_gbps_needed(self) -> float:
        """From which on the disk does not limit the extraction."""
        limits = self.extraction.limits
        padded = self.workload.spec.shard_bytes / self.workload.shard_images
        return min(limits["encoder"], limits["image decoding"]) * padded / 1e9

    @property
    def cores_needed(self) -> int:
        """From which on decoding does not limit the extraction."""
        return math.ceil(self.extraction.limits["encoder"] / self.machine.decode_images_per_s)

    # ------------------------------------------------------------------------------- hours, cost

    @property
    def extraction_hours(self) -> float:
        return self.workload.images / self.extraction.images_per_s / 3600

    @property
    def live_run_hours(self) -> float:
        return self._run_hours(self.live)

    @property
    def cached_run_hours(self) -> float:
        return self._run_hours(self.cached)

    def _run_hours(self, rate: Rate) -> float:
        return self.workload.images * self.workload.epochs / rate.images_per_s / 3600

    @property
    def live_hours(self) -> float:
        """Of all runs."""
        return self.workload.runs * self.live_run_hours

    @property
    def cached_hours(self) -> float:
        """Of the extraction and all runs."""
        return self.extraction_hours + self.workload.runs * self.cached_run_hours

    @property
    def break_even_runs(self) -> float | None:
        """Runs after which the extraction is earned back; None where a run is no faster."""
        saved = self.live_run_hours - self.cached_run_hours
        return self.extraction_hours / saved if saved > 0 else None

    @property
    def break_even_epochs(self) -> float | None:
        """The same in epochs, of all runs together."""
        runs = self.break_even_runs
        return None if runs is None else runs * self.workload.epochs

    @property
    def live_cost(self) -> float | None:
        """Of all runs; None without prices."""
        return None if self.prices is None else self._gpu_cost(self.live_hours)

    @property
    def cached_cost(self) -> float | None:
        """Of the extraction, all runs, and the disk."""
        if self.prices is None:
            return None
        return self._gpu_cost(self.cached_hours) + self.storage_cost

    @property
    def storage_cost(self) -> float:
        if self.prices is None:
            return 0.0
        return self.store_bytes / 1e9 * self.prices.gb_month * self.prices.months

    def _gpu_cost(self, hours: float) -> float:
        assert self.prices is not None
        return hours * self.machine.gpus * self.prices.gpu_hour

    @property
    def freed_bytes(self) -> int | None:
        """GPU memory that the encoder's weights do not take, at least; None where its
        architecture is not known: 2 bytes for each of L (4 D^2 + 2 D I) of a plain ViT's blocks."""
        sizes = self.workload.encoder.architecture or {}
        try:
            width, hidden = sizes["hidden_size"], sizes["intermediate_size"]
            depth = sizes["num_hidden_layers"]
        except KeyError:
            return None
        return int(2 * depth * (4 * width**2 + 2 * width * hidden))

    # ------------------------------------------------------------------------------- the verdict

    @property
    def pays(self) -> bool:
        """Whether the planned runs take fewer hours, extraction included.

        One epoch is a tie where the GPU limits everything: the extraction is what it saves. Hence
        more than rounding is asked for.
        """
        return self.cached_hours < self.live_hours * (1 - 1e-9)

    @property
    def verdict(self) -> str:
        """One sentence, to be read after "The cache"."""
        runs = self.break_even_runs
        if runs is None:
            return f"does not pay: {self._too_slow_a_disk()}{self._smaller_codec()}"
        after = f"{_figure(runs)} runs ({_figure(runs * self.workload.epochs)} epochs)"
        if not self.pays:
            return (
                f"does not pay in {_runs(self.workload.runs)}: the extraction takes "
                f"{_hours(self.extraction_hours)} and a run gets faster by "
                f"{_hours(self.live_run_hours - self.cached_run_hours)} ({figure(self.gain)}x), so "
                f"it is earned back after {after}{self._smaller_codec()}"
            )
        return (
            f"pays after {after}: {_runs(self.workload.runs)} with it take "
            f"{_hours(self.cached_hours)}, extraction included, and {_hours(self.live_hours)} "
            f"without; each run is {figure(self.gain)}x as fast{self._dearer()}"
        )

    def _too_slow_a_disk(self) -> str:
        # The GPU's share of a cached step is always the smaller one: nothing else can be the cause.
        assert self.cached.bottleneck == "disk reads"
        live = self.live.images_per_s
        needed = live * self.image_bytes / 1e9
        return (
            f"reading {figure(self.image_bytes / 1e6, 2)} MB an image at "
            f"{figure(self.machine.read_gbps)} GB/s gives {self.cached.images_per_s:,.0f} "
            f"images/s, and training with the encoder in the loop does {live:,.0f}; more than "
            f"{figure(needed, 2)} GB/s would be needed"
        )

    def _smaller_codec(self) -> str:
        """What would help: the first codec of fewer bytes with which it pays."""
        for codec in ("int8", "int4"):
            other = replace(self, workload=replace(self.workload, codec=codec))
            after = other.break_even_runs
            if other.image_bytes < self.image_bytes and other.pays and after is not None:
                return f"; with --codec {codec} it pays after {_figure(after)} runs"
        return ""

    def _dearer(self) -> str:
        cached, live = self.cached_cost, self.live_cost
        if cached is None or live is None or cached < live:
            return ""
        return f"; but it costs {cached:,.0f} instead of {live:,.0f}, as the disk is not free"


def figure(number: float, digits: int = 3) -> str:
    """Rounded to so many significant digits, or to a whole number where it has more; never with an
    exponent."""
    if number >= 10 ** (digits - 1):
        return f"{number:,.0f}"
    return np.format_float_positional(number, digits, unique=False, fractional=False, trim="-")


def _runs(count: int) -> str:
    return f"{count:,} run{'s' * (count != 1)}"


def _figure(number: float) -> str:
    return f"{number:.1f}" if number < 100 else f"{number:,.0f}"


def _hours(hours: float) -> str:
    if hours >= 1:
        return f"{_figure(hours)} h"
    if hours * 60 >= 1:
        return f"{_figure(hours * 60)} min"
    return f"{hours * 3600:.1f} s" if hours * 3600 >= 0.1 else "under 0.1 s"
