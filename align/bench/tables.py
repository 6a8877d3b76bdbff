"""Result rows of `align bench store` as tables for people."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

Row = dict[str, Any]
RIGHT = tuple(range(1, 11))
COLUMNS = [
    "provider",
    "images/s p20",
    "p50",
    "p80",
    "of ceiling",
    "x tensorstore",
    "CPU ms/image",
    "ms/batch p50",
    "p99",
    "RAM MB",
]


@dataclass(frozen=True, slots=True)
class Table:
    title: str
    columns: list[str]
    rows: list[list[str]]


def sections(rows: Sequence[Row]) -> dict[tuple[str, str, str], dict[str, dict[str, Row]]]:
    """{(cache, order, beside): {provider: {metric: row}}}, in the rows' order."""
    found: dict[tuple[str, str, str], dict[str, dict[str, Row]]] = {}
    for row in rows:
        config = row["config"]
        key = config["cache"], config.get("order", "random"), config.get("beside", "")
        found.setdefault(key, {}).setdefault(row["provider"], {})[row["metric"]] = row
    return found


def title_of(cache: str, order: str, beside: str) -> str:
    busy = f", while the main thread runs {beside}" if beside else ""
    return f"{cache} cache, {order} batches{busy}"


def tables(rows: Sequence[Row]) -> list[Table]:
    """One of each section, fastest first."""
    found = []
    for key, by_provider in sections(rows).items():
        names = sorted(by_provider, key=lambda name: -by_provider[name]["read"]["p50"])
        rates = {name: by_provider[name]["read"]["p50"] for name in names}
        peer = max((rates[name] for name in names if name.startswith("tensorstore")), default=None)
        is_busy = any("main thread" in metrics for metrics in by_provider.values())
        is_read = any("read amplification" in metrics for metrics in by_provider.values())
        columns = [*COLUMNS, *["disk reads"] * is_read, *["main thread"] * is_busy]
        lines = []
        for name in names:
            metrics = by_provider[name]
            read = metrics["read"]
            line = [
                name,
                *(f"{read[part]:,.0f}" for part in ("p20", "p50", "p80")),
                ratio(rates[name], read["ceiling"]),
                ratio(rates[name], peer),
                f"{metrics['CPU']['p50']:.3f}",
                f"{metrics['latency p50']['p50']:.1f}",
                f"{metrics['latency p99']['p50']:.1f}",
                f"{metrics['peak RAM']['p50']:.0f}",
            ]
            if is_read:
                line.append(f"{metrics['read amplification']['p50']:.2f}")
            if is_busy:
                line.append(
                    f"{metrics['main thread']['p50']:.2f}" if "main thread" in metrics else ""
                )
            lines.append(line)
        found.append(Table(title_of(*key), columns, lines))
    return found


def ratio(value: float, of: float | None) -> str:
    return f"{value / of:.2f}" if of else ""
