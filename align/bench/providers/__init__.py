"""What reads the same features, and from which format. One more is one line in `FORMATS` or
`PROVIDERS`, and a class in a file of this folder.

Modules are named, not imported: each provider runs in a process of its own, which imports what it
needs and nothing of its neighbours.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from featcache.errors import ConfigError

ORDERS = ("random", "sequential")
CACHES = ("warm", "cold", "small-ram")

HERE = "align.bench.providers"
FORMATS = {
    "featcache": f"{HERE}.ours_writing:write",
    "flat": f"{HERE}.memmap:write",
    "safetensors": f"{HERE}.safetensors_shards:write",
    "pt": f"{HERE}.pt_files:write",
    "hdf5": f"{HERE}.hdf5:write",
    "tar": f"{HERE}.tars:write",
    "mds": f"{HERE}.mds:write",
    "litdata": f"{HERE}.litdata_chunks:write",
}
"""{format: "module:function" that writes it: (folder, data) -> None}."""


@dataclass(frozen=True, slots=True)
class Provider:
    """One way to read one format.

    reader: "module:class" of a `Reader`. options: its further arguments. format: what it reads,
    "" where that is no file. needs: {module to import: package to install} beyond what featcache
    needs. caches, orders: in which it is measured. beside: also beside a busy main thread.
    ceiling: of which cache state it is the ceiling, or "". is_slow: full runs only, one batch.
    """

    name: str
    reader: str
    format: str
    options: dict[str, Any] = field(default_factory=dict)
    needs: dict[str, str] = field(default_factory=dict)
    caches: tuple[str, ...] = ("warm", "cold")
    orders: tuple[str, ...] = ORDERS
    beside: bool = False
    ceiling: tuple[str, ...] = ()
    is_slow: bool = False

    @property
    def missing(self) -> list[str]:
        """The packages that have to be installed first."""
        return [
            package
            for module, package in self.needs.items()
            if not importlib.util.find_spec(module)
        ]


STREAM = f"{HERE}.ours:Stream"
ONE = {"threads": 1, "check": "never", "io": "buffered"}
TWO = {**ONE, "threads": 2}
EIGHT = {**ONE, "threads": 8}
TENSORSTORE = {"tensorstore": "tensorstore"}
DISK = ("cold", "small-ram")
WARM = ("warm",)

PROVIDERS = [
    Provider(
        "memcpy, 1 thread", f"{HERE}.memory:Memcpy", "", {"threads": 1}, caches=WARM, ceiling=WARM
    ),
    Provider("memcpy, 2 threads", f"{HERE}.memory:Memcpy", "", {"threads": 2}, caches=WARM),
    Provider(
        "plain read of the disk",
        f"{HERE}.memory:PlainRead",
        "flat",
        caches=DISK,
        orders=("sequential",),
        ceiling=DISK,
    ),
    Provider("featcache, 1 thread", STREAM, "featcache", ONE, caches=CACHES, beside=True),
    Provider("featcache, 2 threads", STREAM, "featcache", TWO, caches=CACHES, beside=True),
    Provider(
        "featcache, 1 thread, every checksum", STREAM, "featcache", {**ONE, "check": "always"}
    ),
    Provider(
        "featcache, 1 thread, without its C",
        STREAM,
        "featcache",
        {**ONE, "native": False},
        beside=True,
    ),
    Provider("featcache, as it chooses", STREAM, "featcache", {}, caches=CACHES, beside=True),
    Provider("featcache, 8 threads", STREAM, "featcache", EIGHT, caches=DISK),
    Provider(
        "featcache, 8 threads, O_DIRECT",
        STREAM,
        "featcache",
        {**EIGHT, "io": "direct"},
        caches=DISK,
    ),
    Provider("featcache read, fresh memory", f"{HERE}.ours:Read", "featcache", ONE),
    Provider("np.memmap, np.take", f"{HERE}.memmap:Memmap", "flat", caches=CACHES),
    Provider(
        "h5py, read_direct_chunk", f"{HERE}.hdf5:DirectChunk", "hdf5", caches=CACHES, beside=True
    ),
    Provider("h5py, read_direct", f"{HERE}.hdf5:ReadDirect", "hdf5"),
    Provider(
        "safetensors, a key an image",
        f"{HERE}.safetensors_shards:Safetensors",
        "safetensors",
        caches=CACHES,
    ),
    Provider(
        "tensorstore, images into a buffer",
        f"{HERE}.tensorstore_readers:WriteInto",
        "featcache",
        needs=TENSORSTORE,
        caches=CACHES,
        beside=True,
    ),
    Provider(
        "tensorstore, batch into a buffer",
        f"{HERE}.tensorstore_readers:WriteBatchInto",
        "featcache",
        needs=TENSORSTORE,
        caches=CACHES,
        beside=True,
    ),
    Provider(
        "tensorstore, Batch",
        f"{HERE}.tensorstore_readers:Batch",
        "featcache",
        needs=TENSORSTORE,
    ),
    Provider(
        "tensorstore, index array",
        f"{HERE}.tensorstore_readers:Index",
        "featcache",
        needs=TENSORSTORE,
    ),
    Provider(
        "zarr-python with zarrs, array[i]",
        f"{HERE}.zarrs_pipeline:Zarrs",
        "featcache",
        needs={"zarrs": "zarrs"},
    ),
    Provider("zarr-python, async gather", f"{HERE}.zarr_python:Gather", "featcache"),
    Provider("zarr-python, array[i]", f"{HERE}.zarr_python:Loop", "featcache", caches=CACHES),
    Provider(
        "zarr-python, oindex[rows]",
        f"{HERE}.zarr_python:Oindex",
        "featcache",
        is_slow=True,
        caches=WARM,
        orders=("random",),
    ),
    Provider("DataLoader, 2 workers, preadv", f"{HERE}.loaders:PreadLoader", "featcache"),
    Provider("DataLoader, 2 workers, preadv into slots", f"{HERE}.loaders:SlotLoader", "featcache"),
    Provider("DataLoader, 2 workers, zarr-python", f"{HERE}.loaders:ZarrLoader", "featcache"),
    Provider(
        "MosaicML Streaming, dataset[i]",
        f"{HERE}.mds:Mds",
        "mds",
        needs={"streaming": "mosaicml-streaming"},
        caches=CACHES,
    ),
    Provider(
        "LitData, dataset[i]",
        f"{HERE}.litdata_chunks:LitData",
        "litdata",
        needs={"litdata": "litdata"},
        caches=CACHES,
        orders=("random",),
    ),
    Provider(
        "LitData, iterated",
        f"{HERE}.litdata_chunks:LitDataIterated",
        "litdata",
        needs={"litdata": "litdata"},
        orders=("sequential",),
    ),
    Provider(
        "WebDataset",
        f"{HERE}.tars:WebDataset",
        "tar",
        needs={"webdataset": "webdataset"},
        orders=("sequential",),
    ),
    Provider("one .pt file an image", f"{HERE}.pt_files:PtFiles", "pt"),
]


def choose(words: Sequence[str]) -> list[Provider]:
    """Those whose names contain one of `words`, and the ceilings; all where there are none.

    Raises ConfigError for a word that no name contains.
    """
    chosen = [provider for provider in PROVIDERS if provider.ceiling or not words]
    for word in words:
        found = [each for each in PROVIDERS if word.lower() in each.name.lower()]
        if not found:
            known = dict.fromkeys(each.name.split(",")[0] for each in PROVIDERS)
            raise ConfigError(f"--providers: no provider {word!r}; known: {', '.join(known)}")
        chosen += found
    return [provider for provider in PROVIDERS if provider in chosen]
