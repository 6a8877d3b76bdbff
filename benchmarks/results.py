"""Rows of benchmark results: one schema, one JSON object a line, for every script here.

provider, metric, unit: what was measured. x: the varied parameter, or null.
p20, p50, p80: over the repeats. ceiling: the same figure for what bounds it, in the same run.
config, hardware, versions, commit, date: what it was measured with.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

FOLDER = Path(__file__).parent / "results"


def row(
    provider: str,
    metric: str,
    unit: str,
    values: list[float],
    *,
    x: float | str | None = None,
    ceiling: float | None = None,
    config: dict[str, Any],
) -> dict[str, Any]:
    """One result row from the repeats' values."""
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
        "versions": versions("torch", "numpy", "zarr", "tensorstore"),
        "commit": commit(),
        "date": datetime.now(UTC).date().isoformat(),
    }


def write(name: str, rows: list[dict[str, Any]]) -> Path:
    """Replace results/<name>.jsonl."""
    FOLDER.mkdir(exist_ok=True)
    path = FOLDER / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


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
    return {"python": platform.python_version()} | {
        package: importlib.metadata.version(package) for package in packages
    }


def commit() -> str:
    """The checkout's commit, with "+" where it has uncommitted changes."""

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True
        )
        return done.stdout.strip()

    dirty = git("status", "--porcelain", "--untracked-files=no", ":!results")
    return (git("rev-parse", "--short", "HEAD") or "unknown") + ("+" if dirty else "")
