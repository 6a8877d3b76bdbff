"""`align bench store`, small and untimed: who is measured, what a row holds, who is caught."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from align.bench.batches import random_batches, sequential_batches
from align.bench.plot import write_plot
from align.bench.providers import FORMATS, PROVIDERS, Provider, choose
from align.bench.providers.base import Data, Features, Rows
from align.bench.providers.memmap import Memmap
from align.bench.providers.memory import Memcpy
from align.bench.store import BenchError, Findings, Plan, Watch, measure, require_space
from align.bench.tables import COLUMNS, tables
from featcache.errors import ConfigError

DATA = Data(40, num_patches=16, width=32)  # a whole batch and a short one
PLAN = Plan(DATA, ("warm",), 1, 1, 1, warm_images=80, is_quick=True)
HERE = "tests.align.bench.test_store"


class WrongRow(Memmap):
    """Delivers a neighbour once in a while."""

    def read(self, rows: Rows) -> Features:
        return super().read(np.where(rows == 7, 8, rows))


class WrongType(Memmap):
    def read(self, rows: Rows) -> Features:
        return super().read(rows).astype(np.float32)


class Ends(Memcpy):
    """Its process is gone in the middle of a pass."""

    def read(self, rows: Rows) -> Features:
        raise SystemExit


@pytest.fixture(scope="module")
def findings(tmp_path_factory: pytest.TempPathFactory) -> tuple[Findings, list[str]]:
    """Every provider that is installed here, in a quick run from a warm cache; and its notes."""
    notes: list[str] = []
    watch = Watch(note=notes.append)
    return measure(tmp_path_factory.mktemp("bench"), PLAN, PROVIDERS, watch), notes


def test_everything_installed_is_measured(findings: tuple[Findings, list[str]]) -> None:
    found, notes = findings
    assert found.failed == {}
    measured = {row["provider"] for row in found.rows}
    warm = {provider.name for provider in PROVIDERS if "warm" in provider.caches}
    assert measured == warm - set(found.left_out)
    assert measured >= {
        "memcpy, 1 thread",
        "featcache, 1 thread",
        "featcache, 2 threads",
        "featcache, 1 thread, every checksum",
        "tensorstore, images into a buffer",
        "zarr-python, array[i]",
        "h5py, read_direct_chunk",
        "safetensors, a key an image",
        "DataLoader, 2 workers, preadv",
        "one .pt file an image",
    }
    for name, why in found.left_out.items():
        assert f"left out: {name}: {why}" in notes


def test_rows_are_complete(findings: tuple[Findings, list[str]]) -> None:
    rows = findings[0].rows
    sections = {(row["config"]["order"], row["config"].get("beside")) for row in rows}
    assert sections == {("random", None), ("sequential", None), ("random", "pure Python")}
    for row in rows:
        assert 0 <= row["p20"] <= row["p50"] <= row["p80"]
        assert row["config"]["images"] == 40 and row["config"]["shape"] == [16, 32]
        assert {"python", "torch", "numpy", "zarr"} <= set(row["versions"])
        if row["metric"] == "read":
            assert row["n"] == 1 and row["p20"] > 0 and row["ceiling"] > 0
    of_one = [row for row in rows if row["provider"] == "featcache, 2 threads"]
    assert [row["metric"] for row in of_one if row["config"]["order"] == "sequential"] == [
        "read",
        "throughput",
        "CPU",
        "latency p50",
        "latency p99",
        "peak RAM",
    ]
    assert of_one[-1]["metric"] == "main thread"


def test_table_and_picture(findings: tuple[Findings, list[str]], tmp_path: Path) -> None:
    rows = findings[0].rows
    warm, sequential, beside = tables(rows)
    assert warm.title == "warm cache, random batches" and warm.columns == COLUMNS
    assert sequential.title == "warm cache, sequential batches"
    assert beside.columns == [*COLUMNS, "main thread"]
    assert all(len(line) == len(table.columns) for table in (warm, beside) for line in table.rows)
    write_plot(rows, tmp_path / "pictures" / "store.png")
    assert (tmp_path / "pictures" / "store.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ConfigError, match="no rows of random reads"):
        write_plot([], tmp_path / "none.png")


def test_wrong_bytes_and_ended_processes_are_caught(tmp_path: Path) -> None:
    broken = [
        Provider("memcpy, 1 thread", "align.bench.providers.memory:Memcpy", "", {"threads": 1}),
        Provider("wrong row", f"{HERE}:WrongRow", "flat"),
        Provider("wrong type", f"{HERE}:WrongType", "flat"),
        Provider("ends", f"{HERE}:Ends", "", {"threads": 1}),
        Provider("not there", "align.bench.providers.memory:NotThere", ""),
    ]
    found = measure(tmp_path, PLAN, broken)
    assert {row["provider"] for row in found.rows} == {"memcpy, 1 thread"}
    assert found.failed == {
        "wrong row": "delivers other bytes for row 7 than were written",
        "wrong type": "delivers float32[32, 16, 32] for 32 rows",
        "ends": "its process ended (0)",
        "not there": "AttributeError: module 'align.bench.providers.memory' has no attribute "
        "'NotThere'",
    }


def test_peers_that_are_not_installed_are_left_out(tmp_path: Path) -> None:
    peer = Provider("peer", "nowhere:Peer", "", needs={"no_such_module": "no-such-package"})
    notes: list[str] = []
    found = measure(tmp_path, PLAN, [peer], Watch(note=notes.append))
    assert found.left_out == {"peer": "pip install no-such-package"}
    assert notes[0] == "left out: peer: pip install no-such-package"
    assert found.rows == []


def test_a_disk_too_small_is_refused_first(tmp_path: Path) -> None:
    plan = Plan(Data(10**9), ("warm",), 1, 1, 1, warm_images=1, is_quick=True)
    with pytest.raises(BenchError, match=r"GB free, the benchmark needs 1763596\.8 GB"):
        require_space(tmp_path, plan, [PROVIDERS[3]])
    assert list(tmp_path.iterdir()) == []


def test_cold_reads_come_from_the_disk(tmp_path: Path) -> None:
    """Each byte is fetched again, or (on tmpfs) nothing is claimed."""
    plan = Plan(DATA, ("cold",), 1, 2, 1, warm_images=1, is_quick=True)
    found = measure(tmp_path, plan, choose(["memmap", "direct_chunk"]))
    assert found.failed == {}
    amplification = [row for row in found.rows if row["metric"] == "read amplification"]
    assert all(row["p20"] > 0.9 for row in amplification)
    names = {row["provider"] for row in amplification} | set(found.left_out)
    assert names == {"plain read of the disk", "np.memmap, np.take", "h5py, read_direct_chunk"}


def test_small_ram_or_one_line(tmp_path: Path) -> None:
    """Measured where a memory cgroup can be made; the files are gone afterwards."""
    plan = Plan(DATA, ("small-ram",), 1, 1, 2, warm_images=1, is_quick=True)
    found = measure(tmp_path, plan, choose(["memmap"]))
    assert found.failed == {}
    measured = {row["provider"] for row in found.rows}
    assert measured == {"plain read of the disk", "np.memmap, np.take"} or (
        "no memory cgroup" in found.left_out["small-ram"]
    )
    assert list(tmp_path.iterdir()) == []


def test_batches_are_every_image_once() -> None:
    for batches in (random_batches(40, 100, 3), sequential_batches(40, 100)):
        assert [len(rows) for rows in batches] == [32, 8] * 3
        for first in range(0, 6, 2):
            assert sorted(np.concatenate(batches[first : first + 2])) == list(range(40))
    assert np.array_equal(random_batches(40, 1, 3)[0], random_batches(40, 100, 3)[0])
    assert not np.array_equal(random_batches(40, 1, 3)[0], random_batches(40, 1, 4)[0])


def test_choice_of_providers() -> None:
    assert choose([]) == PROVIDERS
    names = [provider.name for provider in choose(["H5py"])]
    assert names == [
        "memcpy, 1 thread",
        "plain read of the disk",
        "h5py, read_direct_chunk",
        "h5py, read_direct",
    ]
    with pytest.raises(ConfigError, match="no provider 'hdf7'; known: memcpy, "):
        choose(["hdf7"])
    assert {provider.format for provider in PROVIDERS} == {*FORMATS, ""}
