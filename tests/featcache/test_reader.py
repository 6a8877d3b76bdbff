"""The reader: right rows, bounded memory, nothing left behind; in C and in Python, with the page
cache and without, from a folder and from one file.
"""

from __future__ import annotations

import gc
import itertools
import os
import pickle
import random
import resource
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xxhash
import zarr

import featcache
import featcache.bfloat16  # registers the data type with zarr-python
from align.bench.synthetic import write_store
from featcache import gather, read_mode
from featcache.buffers import Buffers
from featcache.codecs import LayerCodec, get_codec
from featcache.convert import convert
from featcache.errors import ConfigError, CorruptStoreError, StoreError
from featcache.memory import _group_bytes, available_bytes
from featcache.read_mode import choose_mode
from featcache.store import Store
from tests.support import STORED, bits

GOOD = np.array([row for row in range(STORED) if row != 4])
READINGS = {
    "native": {"native": True, "io": "buffered"},
    "python": {"native": False, "io": "buffered"},
    "native-direct": {"native": True, "io": "direct"},
    "python-direct": {"native": False, "io": "direct"},
}


def reading_of(name: str, path: Path) -> dict[str, Any]:
    """Options of a reader of the store at `path`; skips the test where it cannot read so."""
    store, options = featcache.open(path), READINGS[name]
    codec = store.layer_codec("-2")
    row_bytes = codec.code_bytes + codec.scale_bytes
    if options["native"] and row_bytes < gather.SHORTEST_NATIVE_BYTES:
        pytest.skip(f"rows of {row_bytes} bytes are read in Python")
    if options["io"] == "direct" and read_mode._direct_problem(store.placements("-2")[0].paths(0)):
        pytest.skip("no O_DIRECT here")
    return options


@pytest.fixture(autouse=True, scope="module")
def collected() -> Iterator[None]:
    """What other tests left is gone, and a collection takes no time."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(params=list(READINGS))
def reading(request: pytest.FixtureRequest, store_path: Path) -> dict[str, Any]:
    """Options of a reader, each way in which rows are read."""
    return reading_of(request.param, store_path)


@pytest.fixture
def copy(zarr_store: Path, tmp_path: Path) -> Path:
    return shutil.copytree(zarr_store, tmp_path / "copy.zarr")


@pytest.fixture(params=list(READINGS))
def copy_reading(request: pytest.FixtureRequest, copy: Path) -> dict[str, Any]:
    """`reading`, of a store that may be spoiled."""
    return reading_of(request.param, copy)


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
def test_the_c_code_was_built() -> None:
    assert gather._gather is not None


def test_checksums_in_c_are_those_of_xxhash() -> None:
    rng = random.Random(0)
    lengths = [64, 65, 127, 128, 240, 241, 1000, 1023, 1024, 1025, 1088, 2048, 100_003]
    pairs = [(a, b) for a in lengths for b in (0, 1, 63, 64, 65, 300, 1177, 4096)]
    pairs += [(rng.randrange(4000), rng.randrange(4000)) for _ in range(300)]
    for a, b in pairs:
        if a + b < gather.SHORTEST_NATIVE_BYTES:
            continue
        first, second = rng.randbytes(a), rng.randbytes(b)
        expected = xxhash.xxh3_64_intdigest(first + second)
        assert gather._gather.checksum(first, second) == expected, (a, b)


# ------------------------------------------------------------------------------------ right rows


def test_rows_are_what_zarr_python_reads(zarr_store: Path, store_path: Path, reading: dict) -> None:
    store = featcache.open(store_path)
    group = zarr.open_group(zarr_store, mode="r")
    rng = np.random.default_rng(0)
    rows = rng.choice(GOOD, 64)
    for layer in store.layers:
        with store.reader(layer, **reading) as reader:
            found = reader.read_stored(rows)
        np.testing.assert_array_equal(bits(found.codes), bits(group[f"features/{layer}"][:][rows]))
        if found.scales is not None:
            np.testing.assert_array_equal(found.scales, group[f"scales/{layer}"][:][rows])


@pytest.fixture(scope="module", params=["fp16", "int8"])
def long_rows(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten images of 263,000 bytes in fp16: read one by one, in pieces."""
    folder = tmp_path_factory.mktemp("long")
    path = write_store(folder / "fp16.zarr", 10, num_patches=263, width=500, shard_images=4)
    if request.param == "fp16":
        return path
    convert(path, folder / "coded.zarr", codec=request.param)
    return folder / "coded.zarr"


@pytest.mark.parametrize("name", list(READINGS))
@pytest.mark.parametrize("check", ["once", "never"])
@pytest.mark.parametrize("memory_bytes", [1, 1 << 40])
def test_long_rows(
    long_rows: Path, name: str, check: str, memory_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the page cache cannot hold them."""
    monkeypatch.setattr(read_mode, "available_bytes", lambda: memory_bytes)
    group = zarr.open_group(long_rows, mode="r")
    rows = np.array([7, 0, 1, 2, 9, 7, 3])
    with featcache.open(long_rows).reader(check=check, **reading_of(name, long_rows)) as reader:
        for found in (reader.read_stored(rows), *reader.stream([rows] * 3)):
            codes = group["features/-2"][:][rows]
            np.testing.assert_array_equal(bits(found.codes), bits(codes))
            if found.scales is not None:
                np.testing.assert_array_equal(found.scales, group["scales/-2"][:][rows])


@pytest.mark.parametrize("name", list(READINGS))
@pytest.mark.parametrize("at", [0, 4096, 200_000, -1])
def test_a_flipped_bit_in_a_long_row(long_rows: Path, tmp_path: Path, name: str, at: int) -> None:
    copied = shutil.copytree(long_rows, tmp_path / "copy.zarr")
    store = featcache.open(copied)
    codes, scales = store.placements("-2")
    last = scales if at == -1 and scales else codes
    with last.paths(0).open("r+b") as file:
        file.seek(last.offset(1) + at % last.row_bytes)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))
    with store.reader(**reading_of(name, copied)) as reader:
        reader.read(np.array([0, 2, 3]))
        with pytest.raises(CorruptStoreError, match=r"c/0/0/0: the features of row 1 are not"):
            reader.read(np.array([0, 1]))


@pytest.mark.parametrize("name", list(READINGS))
def test_streams_of_one_reader_keep_their_buffers_apart(long_rows: Path, name: str) -> None:
    """As a training's and its evaluation's do: by turns, of other sizes, some ended early."""
    store = featcache.open(long_rows)
    group = zarr.open_group(long_rows, mode="r")
    expected = bits(group["features/-2"][:]).reshape(10, -1)
    rng = np.random.default_rng(0)

    def batches() -> list[np.ndarray]:
        return [rng.integers(0, 10, size) for size in rng.integers(1, 9, 12)]

    image_bytes = store.layer_codec("-2").image_bytes
    options = reading_of(name, long_rows)
    with store.reader(threads=1, budget_bytes=20 * image_bytes, **options) as reader:
        for _ in range(12):
            lists = [batches(), batches()]
            streams = [reader.stream(each) for each in lists]
            for turn in range(int(rng.integers(1, 13))):
                found = [next(stream) for stream in streams]
                for rows, features in zip([each[turn] for each in lists], found, strict=True):
                    raw = bits(features.codes).reshape(len(rows), -1)
                    np.testing.assert_array_equal(raw, expected[rows])
            for stream in streams:
                stream.close()  # what it had begun to read must not land in the next one's buffers
        assert reader._buffers.nbytes <= 2 * 20 * image_bytes + 4 * 8 * image_bytes


def test_on_another_device(store_path: Path) -> None:
    """The kind of device that only copies; nothing is there to compare on it."""
    with featcache.open(store_path).reader() as reader:
        for features in reader.stream([GOOD, GOOD[:2]], torch.device("meta")):
            assert features.codes.device.type == "meta"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")
@pytest.mark.parametrize("pin_memory", [True, False])
def test_on_cuda(store_path: Path, pin_memory: bool) -> None:
    store = featcache.open(store_path)
    rng = np.random.default_rng(0)
    batches = [rng.choice(GOOD, size) for size in (3, 8, 1, 8, 5) * 20]
    with store.reader(pin_memory=pin_memory) as reader, store.reader() as plain:
        stream = reader.stream(iter(batches), torch.device("cuda"))
        for rows, features in zip(batches, stream, strict=True):
            assert torch.equal(features.decode().cpu(), plain.read(rows))


@pytest.mark.parametrize("check", ["once", "always", "never"])
def test_stream_equals_read_for_odd_batches(store_path: Path, reading: dict, check: str) -> None:
    store = featcache.open(store_path)
    rng = np.random.default_rng(0)
    batches = [rng.choice(GOOD, size) for size in (1, 32, 0, 5, 7, 1, 64, 3) * 3]
    for threads, depth in ((1, 1), (2, 3), (3, 8)):
        with store.reader(threads=threads, depth=depth, check=check, **reading) as reader:
            seen = 0
            for rows, features in zip(batches, reader.stream(iter(batches)), strict=True):
                again = reader.read_stored(rows)
                np.testing.assert_array_equal(bits(features.codes), bits(again.codes))
                np.testing.assert_array_equal(bits(features.decode()), bits(again.decode()))
                seen += 1
            assert seen == len(batches)


def reads_of_this_process() -> int:
    """System calls that read, so far."""
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(fields["syscr"])


def test_neighbouring_rows_are_read_in_one_call(store_path: Path, reading: dict) -> None:
    store = featcache.open(store_path)
    with store.reader(threads=1, check="never", **reading) as reader:
        reader.read(np.array([0]))
        before = reads_of_this_process()
        own = reads_of_this_process() - before  # of looking
        before = reads_of_this_process()
        reader.read(np.array([3, 1, 0, 2, 8, 10]))
        calls = reads_of_this_process() - before - own
    # Rows 0 to 3 follow each other; 8 and 10 have 9 between them.
    assert calls == 3 * (1 + store.codec.scaled)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([4], "row 4 has no features"),
        ([0, STORED], rf"row {STORED} is out of range; the store had {STORED} rows when it was op"),
        ([-2, 0], "row -2 is out of range"),
        ([-1, 0], r"row -1 has no features; leave out .* Store.rows says -1"),
    ],
)
def test_rows_that_cannot_be_read(store_path: Path, rows: list[int], message: str) -> None:
    with featcache.open(store_path).reader() as reader:
        with pytest.raises(StoreError, match=message):
            reader.read(np.array(rows))
        with pytest.raises(StoreError, match=message):
            list(reader.stream([np.array([0]), np.array(rows)]))


def test_wrong_rows_end_a_stream_when_their_turn_comes(store_path: Path) -> None:
    """And take no buffer with them."""
    store = featcache.open(store_path)
    good = [GOOD[:2]] * 5
    with store.reader(budget_bytes=10 * store.layer_codec("-2").image_bytes) as reader:
        for wrong in ([STORED], [0.5], [[0, 1]]):
            for _ in range(3):
                seen = 0
                with pytest.raises(StoreError, match=r"out of range|one-dimensional array of int"):
                    for _ in reader.stream([*good, np.array(wrong)]):
                        seen += 1
                assert seen == len(good)
        assert len(list(reader.stream(good))) == len(good)
        assert reader._buffers.nbytes <= reader._buffers._budget_bytes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"check": "twice"}, "check='twice': must be one of once"),
        ({"io": "mapped"}, "io='mapped': must be one of auto"),
        ({"threads": 0}, "threads=0: must be at least 1"),
        ({"budget_bytes": 0}, "budget_bytes=0: must be at least 1"),
        pytest.param(
            {"pin_memory": True},
            "pin_memory=True: there is no CUDA device",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is one"),
        ),
    ],
)
def test_wrong_options(store_path: Path, options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        featcache.open(store_path).reader(**options)


def test_without_the_c_code(store_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gather, "_gather", None)
    store = featcache.open(store_path)
    with store.reader() as reader:
        assert isinstance(reader._reads._pool, gather.PythonPool)
        assert reader.read(GOOD).shape == (len(GOOD), 9, 24)
    with pytest.raises(ConfigError, match=r"native=True: .* install featcache again where a C"):
        store.reader(native=True)


# ------------------------------------------------------------------------------- nothing too much


def test_stream_reuses_a_bounded_ring_of_buffers(store_path: Path, reading: dict) -> None:
    with featcache.open(store_path).reader(depth=2, **reading) as reader:
        addresses = {
            features.codes.data_ptr()
            for _ in range(3)
            for features in reader.stream([np.array([0, 1, 2])] * 50)
        }
    assert len(addresses) <= 3


def test_what_is_read_ahead_keeps_to_its_budget(store_path: Path) -> None:
    """As many batches ahead as the budget holds, and two at least."""
    store = featcache.open(store_path)
    layer = store.layer_codec("-2")
    batch_bytes = 5 * (layer.code_bytes + layer.scale_bytes)
    for budget, most in ((1, 2), (2 * batch_bytes, 2), (4 * batch_bytes, 4), (1 << 30, 9)):
        asked = 0

        def batches() -> Iterator[np.ndarray]:
            nonlocal asked
            for _ in range(40):
                asked += 1
                yield GOOD[:5]

        with store.reader(budget_bytes=budget) as reader:
            ahead = [asked - taken for taken, _ in enumerate(reader.stream(batches()))]
        # One is in use. One more is asked for before it is known that there is no room for it.
        assert max(ahead) == (most if most == 9 else most + 1), budget
        assert reader._buffers.nbytes <= max(budget, 2 * batch_bytes)


def test_buffers_of_batches_that_grow() -> None:
    layer = LayerCodec(get_codec("fp16"), 4, 8)
    image = layer.image_bytes
    buffers = Buffers(layer, budget_bytes=10 * image, pin_memory=False)
    small = buffers.take(4, must=False)
    assert small is not None and len(small) == 4
    buffers.give_back(small)
    assert buffers.take(3, must=False) is small  # large enough
    first = buffers.take(7, must=False)
    assert first is not None  # two such batches are granted
    assert buffers.take(7, must=False) is None
    second = buffers.take(7, must=True)
    assert second is not None and buffers.nbytes == 18 * image
    for buffer in (small, first, second):
        buffers.give_back(buffer)
    assert buffers.take(7, must=False) is first  # what is there is used first
    third = buffers.take(8, must=False)
    assert third is not None and len(third) == 8
    assert buffers.nbytes <= 16 * image  # those that were too small have gone
    buffers.give_back(third)
    buffers.clear()


def test_choosing_between_the_page_cache_and_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    example = tmp_path / "shard"
    example.write_bytes(bytes(8192))
    monkeypatch.setattr(read_mode, "available_bytes", lambda: 10 * 10**9)
    fits = choose_mode("auto", 7 * 10**9, example)
    assert (fits.direct, fits.fits) == (False, True)
    assert fits.why == "through the page cache: 7.0 GB of features, 10.0 GB of memory to be had"
    assert choose_mode("auto", 9 * 10**9, example).direct == (
        read_mode._direct_problem(example) is None
    )
    buffered = choose_mode("buffered", 9 * 10**9, example)
    assert (buffered.direct, buffered.fits) == (False, False)
    assert buffered.why.startswith("through the page cache as asked: 9.0 GB of features")
    monkeypatch.setattr(read_mode, "_direct_problem", lambda path: "Invalid argument")
    falls_back = choose_mode("auto", 9 * 10**9, example)
    assert not falls_back.direct
    assert falls_back.why.endswith("but no O_DIRECT (Invalid argument)")
    with pytest.raises(ConfigError, match=r"io=direct: .*shard is not read so \(Invalid argument"):
        choose_mode("direct", 0, example)


@pytest.mark.parametrize("version", [1, 2])
def test_memory_limits_of_control_groups(tmp_path: Path, version: int) -> None:
    """The smallest on the way up; what a group holds of files does not count as used."""
    proc, mount = tmp_path / "proc", tmp_path / "cgroup"
    (proc / "self").mkdir(parents=True)
    line = "7:memory:/job/step" if version == 1 else "0::/job/step"
    (proc / "self/cgroup").write_text(f"12:cpu,cpuacct:/elsewhere\n{line}\n")
    root = mount / "memory" if version == 1 else mount
    names = ("memory.limit_in_bytes", "total_rss") if version == 1 else ("memory.max", "anon")
    for folder, limit in (("", "max"), ("job", "5000"), ("job/step", "9000")):
        (root / folder).mkdir(parents=True, exist_ok=True)
        (root / folder / names[0]).write_text(f"{limit}\n")
        (root / folder / "memory.stat").write_text(f"cache 4000\n{names[1]} 1200\n")
    assert sorted(_group_bytes(proc, mount))[:2] == [3800, 7800]
    assert min(_group_bytes(tmp_path / "none", mount)) > 1 << 60
    assert 0 < available_bytes() < 1 << 50


# ------------------------------------------------------------------------- nothing is left behind


def open_files() -> int:
    gc.collect()  # what goes later belongs to other tests
    return len(list(Path("/proc/self/fd").iterdir()))


def running_threads() -> int:
    """Those of C included."""
    return len(list(Path("/proc/self/task").iterdir()))


def left_behind(files: int, threads: int) -> tuple[int, int]:
    """Open files and threads more than that; those of Python go a moment after they were joined."""
    until = time.monotonic() + 10
    while running_threads() > threads and time.monotonic() < until:
        time.sleep(0.01)
    return open_files() - files, running_threads() - threads


def test_close_leaves_no_file_and_no_thread(store_path: Path, reading: dict) -> None:
    store = featcache.open(store_path)
    files, threads = open_files(), running_threads()
    for _ in range(3):
        with store.reader(**reading) as reader:
            iterator = reader.stream([np.array([0, 5, 9])] * 10)
            next(iterator)
            assert running_threads() > threads
            iterator.close()
    assert left_behind(files, threads) == (0, 0)


def test_a_forgotten_reader_leaves_nothing_either(store_path: Path, reading: dict) -> None:
    store = featcache.open(store_path)
    files, threads = open_files(), running_threads()
    reader = store.reader(**reading)
    iterator = reader.stream([np.array([0, 5, 9])] * 10)
    next(iterator)
    del reader, iterator
    assert left_behind(files, threads) == (0, 0)


def test_closing_under_a_stream_does_not_hang(store_path: Path, reading: dict) -> None:
    reader = featcache.open(store_path).reader(threads=1, depth=8, **reading)
    iterator = reader.stream([np.array([0, 5, 9])] * 50)
    next(iterator)
    reader.close()
    ends_within(20, iterator.close)
    with pytest.raises(StoreError, match="this feature reader is closed"):
        reader.read(np.array([0]))


def ends_within(seconds: float, *calls: Callable[[], object]) -> None:
    """At once, in threads of their own."""
    threads = [threading.Thread(target=call, daemon=True) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(seconds)
    assert not any(thread.is_alive() for thread in threads)


def test_going_on_after_close_is_an_error(store_path: Path, reading: dict) -> None:
    reader = featcache.open(store_path).reader(threads=1, depth=8, **reading)
    iterator = reader.stream([GOOD] * 50)
    next(iterator)
    reader.close()
    errors = []

    def go_on() -> None:
        try:
            list(iterator)
        except StoreError as error:
            errors.append(str(error))

    ends_within(20, go_on)
    assert len(errors) == 1 and "closed" in errors[0]


def test_several_threads_close_a_reader(store_path: Path, reading: dict) -> None:
    for _ in range(20):
        reader = featcache.open(store_path).reader(threads=4, **reading)
        begun = [reader.begin(GOOD) for _ in range(3)]
        ends_within(20, reader.close, reader.close, reader.close)
        del begun


def test_a_stream_that_a_collection_ends(store_path: Path, reading: dict) -> None:
    """In the middle of anything, as it comes: of another read of the same thread too."""
    with featcache.open(store_path).reader(**reading) as reader:

        class Holder:
            def __init__(self) -> None:
                self.iterator = reader.stream(itertools.repeat(GOOD[:2]))
                self.cycle = self  # so that only a collection finds it

        def read() -> None:
            for _ in range(60):
                next(Holder().iterator)
                for _ in range(5):
                    reader.read(GOOD[:3])

        before = gc.get_threshold()
        gc.set_threshold(20)
        try:
            ends_within(60, read)
        finally:
            gc.set_threshold(*before)


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_child_forked_while_another_thread_reads(store_path: Path, reading: dict) -> None:
    stop = threading.Event()
    with featcache.open(store_path).reader(**reading) as reader:

        def read() -> None:
            while not stop.is_set():
                reader.read(GOOD)

        busy = threading.Thread(target=read)
        busy.start()
        try:
            for _ in range(10):
                child = os.fork()
                if child == 0:
                    signal.alarm(20)  # ends a child that hangs
                    reader.close()
                    os._exit(7)
                assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
        finally:
            stop.set()
            busy.join()


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_forked_child_reads_on(store_path: Path, reading: dict) -> None:
    with featcache.open(store_path).reader(**reading) as reader:
        expected = bits(reader.read(GOOD))
        iterator = reader.stream([GOOD[:3]] * 10)
        next(iterator)
        child = os.fork()
        if child == 0:
            same = np.array_equal(bits(reader.read(GOOD)), expected)
            try:  # what the parent's threads read there may not be here
                for features in iterator:
                    same = same and np.array_equal(bits(features.decode()), expected[:3])
            except StoreError as error:
                same = same and "forked" in str(error)
            reader.close()
            os._exit(7 if same else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
        assert len(list(iterator)) == 9


def test_a_pickled_reader_opens_the_store_again(store_path: Path, reading: dict) -> None:
    store = featcache.open(store_path)
    assert len(pickle.dumps(store)) < 1000  # not its index
    with store.reader("last", **reading) as reader, pickle.loads(pickle.dumps(reader)) as again:
        assert again.options == reader.options
        np.testing.assert_array_equal(bits(again.read(GOOD)), bits(reader.read(GOOD)))


class Features(torch.utils.data.Dataset[torch.Tensor]):
    """What a user would write for a `DataLoader`: one batch of rows an item."""

    def __init__(self, store: Store, **options: Any) -> None:
        self.reader = store.reader(**options)

    def __len__(self) -> int:
        return len(GOOD)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.reader.read(GOOD[[index]], torch.float32)[0]

    def __getitems__(self, indices: list[int]) -> list[torch.Tensor]:
        return list(self.reader.read(GOOD[indices], torch.float32))


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:This DataLoader will create 2 worker:UserWarning")
def test_in_the_workers_of_a_data_loader(store_path: Path, reading: dict) -> None:
    dataset = Features(featcache.open(store_path), **reading)
    expected = bits(dataset.reader.read(GOOD, torch.float32))
    loader = torch.utils.data.DataLoader(
        dataset, batch_size=3, num_workers=2, multiprocessing_context="fork"
    )
    for _ in range(2):
        np.testing.assert_array_equal(bits(torch.cat(list(loader))), expected)


# ------------------------------------------------------------------- files that change or give out


def test_a_shard_that_is_cut_while_it_is_read(copy: Path, copy_reading: dict) -> None:
    with featcache.open(copy).reader(check="never", **copy_reading) as reader:
        reader.read(np.array([0, 1, 2, 3]))
        os.truncate(copy / "features/-2/c/0/0/0", 100)
        message = r"features/-2/c/0/0/0 is truncated; `featcache verify .* --repair`"
        with pytest.raises(CorruptStoreError, match=message):
            list(reader.stream([np.array([5]), np.array([0, 1, 2, 3])]))
        reader.read(np.array([5, 6]))


def test_a_shard_that_is_replaced_while_it_is_read(copy: Path, copy_reading: dict) -> None:
    """The open file is read on; once it is opened again, nothing of it is believed unseen."""
    shard = copy / "features/-2/c/0/0/0"
    with featcache.open(copy).reader(**copy_reading) as reader:
        before = bits(reader.read(GOOD))
        content = bytearray(shard.read_bytes())
        content[0] ^= 1
        other = shard.with_name("other")
        other.write_bytes(content)
        other.rename(shard)
        np.testing.assert_array_equal(bits(reader.read(GOOD)), before)
        for files in reader._reads._files:
            files.close()  # as if others had been read meanwhile
        for rows in (GOOD[:1], GOOD[:1]):
            with pytest.raises(CorruptStoreError, match="row 0 are not the bytes that were writ"):
                reader.read(rows)
        reader.read(GOOD[1:])


def test_a_missing_shard_and_flipped_bytes_are_named(copy: Path, copy_reading: dict) -> None:
    (copy / "features/-2/c/1/0/0").unlink()
    flipped = copy / "features/-2/c/2/0/0"
    content = bytearray(flipped.read_bytes())
    content[3] ^= 4
    flipped.write_bytes(content)
    with featcache.open(copy).reader(**copy_reading) as reader:
        with pytest.raises(CorruptStoreError, match=r"features/-2/c/1/0/0: No such file"):
            reader.read(np.array([0, 5]))
        with pytest.raises(CorruptStoreError, match=r"c/2/0/0: the features of row 8 are not"):
            reader.read(np.array([0, 8, 9]))
        content[3] ^= 4
        mended = flipped.with_name("mended")
        mended.write_bytes(content)
        mended.rename(flipped)
        reader.read(np.array([0, 8, 9]))  # what the message told to do has been done


def test_files_are_left_for_others(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of batches read ahead no more are begun than leave the process half of its files."""
    store = featcache.open(copy)
    monkeypatch.setattr("featcache.open_files.most_files", lambda: 40)
    monkeypatch.setattr("featcache.row_reads.most_files", lambda: 40)
    for row in GOOD.tolist():
        assert row // 4 < 3
    batches = [np.array([0, 5, 9])] * 30  # three shards each, and their scales
    with store.reader(depth=8) as reader:
        before = open_files()
        most = max(open_files() - before for _ in reader.stream(batches))
    assert 0 < most <= 20


@contextmanager
def files_left(count: int) -> Iterator[None]:
    """Only so many more files can be opened."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    probe = os.open("/dev/null", os.O_RDONLY)
    os.close(probe)
    taken = {int(entry.name) for entry in Path("/proc/self/fd").iterdir()}
    free = [number for number in range(probe, soft) if number not in taken]
    resource.setrlimit(resource.RLIMIT_NOFILE, (free[count], hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_too_many_open_files(copy: Path, copy_reading: dict) -> None:
    """The reader does with fewer, and says so where there are none at all."""
    gc.collect()  # what goes later would leave more
    store = featcache.open(copy)
    with store.reader(**copy_reading) as reader, store.reader("last", **copy_reading) as other:
        expected = bits(other.read(GOOD))
        for files in other._reads._files:
            files.close()
        reader.read(GOOD)  # 3 shards, 6 files where there are scales
        with files_left(1):
            # `reader` has them open and is another one: nothing that `other` could close.
            with pytest.raises(StoreError, match=r"Too many open files, although .*`ulimit -n`"):
                other.read(GOOD)
            reader.read(GOOD)
        np.testing.assert_array_equal(bits(other.read(GOOD)), expected)
        for row in GOOD.tolist():
            with files_left(2 if store.codec.scaled else 1):
                assert other.read(np.array([row])).isfinite().all()
