"""Rows of benchmark results: one schema, one JSON object a line, for every benchmark.

provider, metric, unit: what was measured. x: the varied parameter, or null.
p20, p50, p80: over the repeats. ceiling: the same figure for what bounds it, in the same run.
config, hardware, versions, commit, date: what it was measured with.
"""

from __future__ import annotations

import functools
import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("torch", "numpy", "zarr", "tensorstore")


def row(
    provider: str,
    metric: str,
    unit: str,
    values: Sequence[float],
    *,
    x: float | str | None = None,
    ceiling: float | None = None,
    config: dict[str, Any],
    packages: Sequence[str] = (),
) -> dict[str, Any]:
    """One result row from the repeats' values.

    packages: what was measured beside `PACKAGES`, by its name on the package index.
    """
    p20, p50, p80 = np.percentile(values, [20, 50, 80]).tolist()
    return {
        "provider": provider,
        "metric": metric,
        "unit": unit,
        "x": x,
        "p20": p20,
        "p50": p50,
        "p80": p80,
        "n": len(values),
        "ceiling": ceiling,
        "config": config,
        "hardware": hardware(),
        "versions": versions(*PACKAGES, *packages),
        "commit": commit(),
        "date": datetime.now(UTC).date().isoformat(),
    }


def write(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Replace `path` by these rows, one a line. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def read(path: Path) -> list[dict[str, Any]]:
    """What `write` wrote. Raises OSError, ValueError for a line that is no JSON."""
    return [json.loads(line) for line in path.read_text().splitlines()]


@functools.cache
def hardware() -> dict[str, Any]:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    names = [
        line.split(":", 1)[1].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    return {
        "cpu": names[0] if names else platform.machine(),
        "cores": os.cpu_count(),
        "memory_gb": round(memory / 1e9, 1),
    }


def versions(*packages: str) -> dict[str, str]:
    """Of Python and of those packages that are installed."""
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


@functools.cache
def commit() -> str:
    """The checkout's commit, with "+" where it has uncommitted changes; "unknown" elsewhere."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
        return done.stdout.strip()

    # An installed package may lie in the checkout of another project.
    if not (ROOT / ".git").exists():
        return "unknown"
    try:
        dirty = git("status", "--porcelain", "--untracked-files=no", ":!benchmarks/results")
        return (git("rev-parse", "--short", "HEAD") or "unknown") + ("+" if dirty else "")
    except FileNotFoundError:  # no git
        return "unknown"
