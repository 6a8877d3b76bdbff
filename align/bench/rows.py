"""From passes to result rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from align.bench import results
from align.bench.process import Pass
from align.bench.providers import Provider
from align.bench.providers.base import BATCH_IMAGES, Data, Rows


@dataclass(frozen=True, slots=True)
class Section:
    """What is compared with each other. cache, order: as in align.bench.providers. beside: what
    the main thread does meanwhile, "" for nothing."""

    cache: str
    order: str
    beside: str = ""


@dataclass(frozen=True, slots=True)
class Measured:
    """A provider's passes of one section. batches: of each pass. peak_bytes: added since it was
    opened."""

    provider: Provider
    batches: list[list[Rows]]
    passes: list[Pass]
    peak_bytes: int

    def images(self) -> list[int]:
        """Of each pass."""
        return [sum(map(len, batches)) for batches in self.batches]

    def rates(self) -> list[float]:
        """images/s of each pass."""
        return [n / each.seconds for n, each in zip(self.images(), self.passes, strict=True)]

    def amplification(self, data: Data) -> list[float]:
        """Bytes fetched from the disk for each byte delivered, of each pass."""
        return [
            each.used.read_bytes / (n * data.image_bytes)
            for n, each in zip(self.images(), self.passes, strict=True)
        ]


def rows_of(section: Section, data: Data, measured: Sequence[Measured]) -> list[dict[str, Any]]:
    """Result rows of a section; the ceiling among `measured` stands beside every rate."""
    ceilings = [each for each in measured if section.cache in each.provider.ceiling]
    ceiling = float(np.median(ceilings[0].rates())) if ceilings else None
    return [row for each in measured for row in rows_of_one(section, data, each, ceiling)]


def rows_of_one(
    section: Section, data: Data, measured: Measured, ceiling: float | None
) -> list[dict[str, Any]]:
    provider = measured.provider
    config: dict[str, Any] = {
        "images": data.images,
        "shape": list(data.image_shape),
        "dtype": "float16",
        "batch": BATCH_IMAGES,
        "batches": len(measured.batches[0]),
        "cache": section.cache,
        "order": section.order,
        "format": provider.format,
        **provider.options,
    }
    if section.beside:
        config["beside"] = section.beside
    passes, images = measured.passes, measured.images()
    gb = data.image_bytes / 1e9
    latencies_ms = [1e3 * s for each in passes for s in each.batch_s]
    figures: list[tuple[str, str, list[float], float | None]] = [
        ("read", "images/s", measured.rates(), ceiling),
        ("throughput", "GB/s", [r * gb for r in measured.rates()], ceiling and ceiling * gb),
        (
            "CPU",
            "ms/image",
            [1e3 * each.used.cpu_s / n for each, n in zip(passes, images, strict=True)],
            None,
        ),
        ("latency p50", "ms/batch", [float(np.percentile(latencies_ms, 50))], None),
        ("latency p99", "ms/batch", [float(np.percentile(latencies_ms, 99))], None),
        ("peak RAM", "MB", [measured.peak_bytes / 1e6], None),
    ]
    if section.cache != "warm":
        figures.append(("read amplification", "ratio", measured.amplification(data), None))
    if ratios := [each.main_ratio for each in passes if each.main_ratio is not None]:
        figures.append(("main thread", "of alone", ratios, None))
    return [
        results.row(
            provider.name,
            metric,
            unit,
            values,
            ceiling=bound,
            config=config,
            packages=(*provider.needs.values(), "h5py", "safetensors"),
        )
        for metric, unit, values, bound in figures
    ]
