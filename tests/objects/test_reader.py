"""Features out of a bucket through the local tier: the same as from a disk, whatever goes wrong."""

from __future__ import annotations

import os
import pickle
import random
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import featcache
from featcache import tier_pool
from featcache.errors import ConfigError, CorruptStoreError, ObjectStoreError, StoreError
from featcache.extract import extract
from featcache.join import StoreJoin
from featcache.object_path import ObjectPath
from featcache.store import Store
from featcache.tier import Tier
from tests.objects.test_extract import options_for
from tests.support import write_images
from tests.support_s3 import Fault, Proxy, Request, forget, lasting

IMAGES = 40
ROWS = np.arange(IMAGES)


@pytest.fixture(scope="module")
def folders(encoder_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same images' features in a store of each kind, on the disk."""
    folder = tmp_path_factory.mktemp("stores")
    write_images(folder / "images", IMAGES)
    made = {}
    for codec in ("fp16", "int8"):
        made[codec] = folder / f"{codec}.zarr"
        extract(options_for(encoder_dir, folder / "images", made[codec], codec=codec))
    return made


@pytest.fixture(params=["fp16", "int8"])
def stores(
    request: pytest.FixtureRequest, folders: dict[str, Path], bucket: ObjectPath
) -> tuple[Path, ObjectPath]:
    """A store on the disk, and a copy of it in a bucket."""
    return upload(folders[request.param], bucket)


@pytest.fixture
def plain(folders: dict[str, Path], bucket: ObjectPath) -> tuple[Path, ObjectPath]:
    return upload(folders["fp16"], bucket)


def upload(folder: Path, bucket: ObjectPath) -> tuple[Path, ObjectPath]:
    root = bucket / "store.zarr"
    for path in folder.rglob("*"):
        if path.is_file():
            (root / path.relative_to(folder).as_posix()).write([path.read_bytes()])
    return folder, root


def batches(seed: int, count: int = 12, size: int = 9) -> list[np.ndarray]:
    """Random rows, some of them twice in a batch."""
    rng = np.random.default_rng(seed)
    return [rng.integers(0, IMAGES, size) for _ in range(count)]


def read_all(store: Store, wanted: list[np.ndarray], **options) -> list[torch.Tensor]:
    with store.reader(**options) as reader:
        return [features.decode(torch.float32).clone() for features in reader.stream(wanted)]


def is_range(request: Request) -> bool:
    return request.method == "GET" and "/c/" in request.path and "/index/" not in request.path


@pytest.mark.parametrize("native", [None, False])
@pytest.mark.parametrize("check", ["once", "always", "never"])
def test_the_same_features_as_from_a_disk(
    stores: tuple[Path, ObjectPath], proxy: Proxy, native: bool | None, check: str
) -> None:
    folder, root = stores
    wanted = batches(0)
    expected = read_all(featcache.open(folder), wanted)
    store = featcache.open(root)
    for epoch in range(2):
        with proxy.failing(lambda _: None):
            found = read_all(store, wanted, native=native, check=check)
        assert all(map(torch.equal, found, expected))
        assert any(map(is_range, proxy.seen)) == (epoch == 0)
    assert np.array_equal(store.rows(["0003.png", "none"]), [3, -1])
    assert store.plans[0].keys == featcache.open(folder).plans[0].keys


def test_a_store_in_a_bucket_is_joined_with_one_on_a_disk(
    plain: tuple[Path, ObjectPath], folders: dict[str, Path]
) -> None:
    joined = StoreJoin([featcache.open(folders["int8"]), featcache.open(plain[1])])
    rows = joined.rows(["0007.png", "0001.png"])
    with joined.reader() as reader:
        left, right = reader.read(rows, torch.float32)
    assert torch.equal(right, read_all(featcache.open(plain[0]), [rows[:, 1]])[0])
    assert torch.equal(left, read_all(featcache.open(folders["int8"]), [rows[:, 0]])[0])


def test_each_row_is_asked_for_once(plain: tuple[Path, ObjectPath], proxy: Proxy) -> None:
    store = featcache.open(plain[1])
    with proxy.failing(lambda _: None), store.reader() as reader:
        reader.read(np.array([0, 9, 0, 9, 20]))
        assert sum(map(is_range, proxy.seen)) == 3
        reader.read(np.array([20, 0, 9, 39]))
        assert sum(map(is_range, proxy.seen)) == 4
    with proxy.failing(lambda _: None), store.reader() as reader:
        reader.read(ROWS)  # neighbours in a shard by one request
        assert sum(map(is_range, proxy.seen)) <= 14
    with proxy.failing(lambda _: None):
        read_all(Store(plain[1]), [ROWS])
        # Nor are index and channels fetched again: only the description is looked at.
        assert [request.method for request in proxy.seen] == ["GET"]


def test_faults_change_nothing(stores: tuple[Path, ObjectPath], proxy: Proxy) -> None:
    folder, root = stores
    kinds = [Fault("refuse"), Fault("cut"), Fault("lose"), Fault("stall", seconds=0.2)]
    rng, lock = random.Random(0), threading.Lock()

    def sometimes(_: Request) -> Fault | None:
        with lock:
            return rng.choice(kinds) if rng.random() < 0.3 else None

    wanted = batches(1)
    with proxy.failing(sometimes):
        found = read_all(featcache.open(root), wanted)
    assert proxy.faults > 5
    assert all(map(torch.equal, found, read_all(featcache.open(folder), wanted)))


def test_an_outage_is_waited_for_or_told(
    plain: tuple[Path, ObjectPath], proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = featcache.open(plain[1])
    with proxy.failing(lasting(1.5, Fault("refuse"))):
        read_all(store, [ROWS[:3]])
    monkeypatch.setenv("FEATCACHE_RETRY_S", "1")
    forget()
    with (
        store.reader() as reader,
        proxy.failing(lambda _: Fault("refuse")),
        pytest.raises(ObjectStoreError, match=r"store.zarr/features.*HTTP 503"),
    ):
        reader.read(ROWS[:8])
    with store.reader() as reader:  # what has failed leaves nothing behind
        assert reader.read(ROWS).isfinite().all()


def test_damage_in_the_bucket_is_told(plain: tuple[Path, ObjectPath], proxy: Proxy) -> None:
    folder, root = plain
    shard = root / "features/-2/c/1/0/0"
    content = bytearray(shard.read_bytes())
    content[100] ^= 1
    shard.write([bytes(content)])
    store = featcache.open(root)
    with store.reader() as reader, proxy.failing(lambda _: None):
        with pytest.raises(CorruptStoreError, match=rf"{shard}: the features of row 4 .*copy s3"):
            reader.read(np.array([1, 4, 30]))
        # Asked for twice before it is believed.
        assert sum("/c/1/0/0" in request.path for request in proxy.seen) == 2
        assert torch.equal(
            reader.read(np.array([1, 30, 5])),
            featcache.open(folder).reader().read(np.array([1, 30, 5])),
        )
        shard.write([bytes(content[:5000])])
        with pytest.raises(CorruptStoreError, match="is truncated"):
            reader.read(np.array([6]))
        shard.unlink()
        with pytest.raises(CorruptStoreError, match=r"No such file.*if it is gone, copy s3"):
            reader.read(np.array([7]))
    index = next((root / "index").glob("0*")) / "status/c/0"
    index.write([b"x"])
    forget()
    with pytest.raises(CorruptStoreError, match=r"status is damaged"):
        Store(root, cache_dir=folder.parent / "another tier")


def test_damage_in_the_tier_is_mended(stores: tuple[Path, ObjectPath], proxy: Proxy) -> None:
    """What a power loss may leave: flags without rows; and files of any content."""
    folder, root = stores
    expected = read_all(featcache.open(folder), [ROWS])
    store = featcache.open(root)
    read_all(store, [ROWS])
    mirrors = sorted((store.tier.folder / "shards").iterdir())
    assert len(mirrors) == 10 * (1 + store.codec.scaled)
    for i, mirror in enumerate(mirrors):
        with mirror.open("r+b") as file:
            if i % 2:
                file.write(os.urandom(3000))
            elif i % 4:
                file.truncate(10)
    for array in (store.tier.folder / "arrays").rglob("0"):
        if array.is_file():
            array.unlink()  # else it would change under who has it mapped
            array.write_bytes(b"torn")
    with proxy.failing(lambda _: None):
        assert torch.equal(read_all(featcache.open(root), [ROWS])[0], expected[0])
    assert any(map(is_range, proxy.seen))
    with proxy.failing(lambda _: None):
        assert torch.equal(read_all(featcache.open(root), [ROWS])[0], expected[0])
    assert not any(map(is_range, proxy.seen))


@pytest.mark.parametrize("cache_bytes", [0, 60_000])
def test_a_tier_smaller_than_a_batch(
    stores: tuple[Path, ObjectPath], tmp_path: Path, cache_bytes: int
) -> None:
    folder, root = stores
    wanted = batches(2, count=30, size=16)
    store = featcache.open(root, cache_dir=tmp_path / "small", cache_bytes=cache_bytes)
    found = read_all(store, wanted, depth=3)
    assert all(map(torch.equal, found, read_all(featcache.open(folder), wanted)))
    held = sum(size for _, size, _ in store.tier._files())
    # What several threads have just written may stand above it.
    assert held <= cache_bytes + 32 * 8192


def test_the_least_recently_used_go_first(tmp_path: Path) -> None:
    tier = Tier(tmp_path / "tier", 110_000)
    mirrors = {}
    for name in "abcde":
        mirrors[name] = tier.mirror(ObjectPath("s3://b", name), "", 40_960, 10)
        mirrors[name].write(memoryview(os.urandom(16_384)), 0, 0, 4)
    for i, name in enumerate("badce"):
        os.utime(mirrors[name].descriptor, (i, i))
    tier.added(81_920)
    assert not any(mirror.removed for mirror in mirrors.values())
    mirrors["f"] = tier.mirror(ObjectPath("s3://b", "f"), "", 40_960, 10)
    mirrors["f"].write(memoryview(os.urandom(32_768)), 0, 0, 8)
    tier.added(32_768)
    assert [name for name, mirror in mirrors.items() if mirror.removed] == ["a", "b"]
    assert mirrors["a"].present().tolist() == [True] * 4 + [False] * 6  # read on by who has it
    again = tier.mirror(ObjectPath("s3://b", "a"), "", 40_960, 10)
    assert not again.present().any()


def test_a_full_disk_makes_the_tier_smaller(
    plain: tuple[Path, ObjectPath], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, root = plain
    store = featcache.open(root)
    before = store.tier.nbytes
    real, left = os.pwrite, [5]

    def full(descriptor: int, content: bytes, at: int) -> int:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(28, "No space left on device")
        return real(descriptor, content, at)

    monkeypatch.setattr(os, "pwrite", full)
    wanted = batches(3)
    found = read_all(store, wanted)
    assert all(map(torch.equal, found, read_all(featcache.open(folder), wanted)))
    assert store.tier.nbytes < before


def test_processes_share_a_tier(plain: tuple[Path, ObjectPath], tmp_path: Path) -> None:
    """Two at once, in a tier that is too small for what either of them reads."""
    folder, root = plain
    script = (
        "import sys, numpy as np, featcache\n"
        "rng = np.random.default_rng(int(sys.argv[3]))\n"
        "store = featcache.open(sys.argv[1], cache_dir=sys.argv[2], cache_bytes=120_000)\n"
        "with store.reader() as reader:\n"
        "    for features in reader.stream(rng.integers(0, 40, (30, 9))):\n"
        "        print(features.decode().float().sum().item())\n"
    )
    command = [sys.executable, "-c", script, str(root), str(tmp_path / "shared")]
    jobs = [subprocess.Popen([*command, str(seed)], stdout=subprocess.PIPE) for seed in (1, 2)]
    store = featcache.open(folder)
    for seed, job in zip((1, 2), jobs, strict=True):
        said, _ = job.communicate(timeout=120)
        wanted = list(np.random.default_rng(seed).integers(0, 40, (30, 9)))
        expected = [features.sum().item() for features in read_all(store, wanted)]
        assert [float(line) for line in said.split()] == expected


def test_killed_while_it_fills_the_tier(
    plain: tuple[Path, ObjectPath], proxy: Proxy, tmp_path: Path
) -> None:
    folder, root = plain
    script = (
        "import sys, numpy as np, featcache\n"
        "with featcache.open(sys.argv[1], cache_dir=sys.argv[2]).reader() as reader:\n"
        "    for _ in reader.stream(np.arange(40).reshape(20, 2)): print(flush=True)\n"
    )
    for some in (1, 5):
        with proxy.failing(lambda r: Fault("stall", seconds=0.1) if is_range(r) else None):
            command = [sys.executable, "-c", script, str(root), str(tmp_path / "tier2")]
            job = subprocess.Popen(command, stdout=subprocess.PIPE)
            assert job.stdout is not None
            for _ in range(some):
                job.stdout.readline()
            job.send_signal(signal.SIGKILL)
            job.communicate()
    store = featcache.open(root, cache_dir=tmp_path / "tier2")
    with proxy.failing(lambda _: None):
        assert torch.equal(read_all(store, [ROWS])[0], read_all(featcache.open(folder), [ROWS])[0])
    fetched = sum(map(is_range, proxy.seen))
    assert fetched < 11  # what was fetched before a kill stays


def test_a_reader_may_be_pickled_and_closed_while_it_reads(
    plain: tuple[Path, ObjectPath], proxy: Proxy, tmp_path: Path
) -> None:
    store = featcache.open(plain[1], cache_dir=tmp_path / "own", cache_bytes=10**7)
    with store.reader() as reader, pickle.loads(pickle.dumps(reader)) as again:
        assert torch.equal(reader.read(ROWS[:5]), again.read(ROWS[:5]))
    copy = pickle.loads(pickle.dumps(store))
    assert (copy.tier.folder, copy.tier.nbytes) == (tmp_path / "own", 10**7)
    with proxy.failing(lambda r: Fault("stall", seconds=0.3) if is_range(r) else None):
        reader = store.reader()
        stream = reader.stream([ROWS[i : i + 4] for i in range(8, 40, 4)])
        next(stream)
        start = time.monotonic()
        stream.close()
        reader.close()
        assert time.monotonic() - start < 3
    with pytest.raises(StoreError, match="closed"):
        reader.read(ROWS[:2])


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_data_loaders_forked_worker_reads_too(plain: tuple[Path, ObjectPath]) -> None:
    folder, root = plain
    expected = read_all(featcache.open(folder), [ROWS])[0]
    with featcache.open(root).reader() as reader:
        reader.read(ROWS[:20])

        class Features(torch.utils.data.Dataset):
            def __len__(self) -> int:
                return IMAGES

            def __getitem__(self, row: int) -> torch.Tensor:
                return reader.read(np.array([row]), torch.float32)[0]

        loader = torch.utils.data.DataLoader(
            Features(), 8, num_workers=1, multiprocessing_context="fork"
        )
        assert torch.equal(torch.cat(list(loader)), expected)


def test_what_the_tier_is_asked_to_be(
    plain: tuple[Path, ObjectPath], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = plain[1]
    with featcache.open(root, cache_bytes=10_000).reader() as reader:
        assert re.search(
            r"from s3://.* through .*tier \(0.0 MB at the most; 0.2 MB of features: about \d+% of "
            "it stays there, the rest is fetched again in each epoch",
            reader.mode.why,
        )
    with featcache.open(root).reader() as reader:
        assert "all of it stays there" in reader.mode.why
    with pytest.raises(ConfigError, match="io=direct"):
        featcache.open(root).reader(io="direct")
    with pytest.raises(ConfigError, match="cache_bytes=-1"):
        featcache.open(root, cache_bytes=-1)
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StoreError, match=r"file: features of a bucket cannot be kept there"):
        featcache.open(root, cache_dir=tmp_path / "file")
    assert tier_pool.RUN_BYTES > 0


def test_zarr_and_tensorstore_open_it_too(plain: tuple[Path, ObjectPath], server) -> None:
    import tensorstore
    import zarr
    from obstore.store import S3Store
    from zarr.storage import ObjectStore

    folder, root = plain
    expected = read_all(featcache.open(folder), [ROWS])[0].numpy()
    s3 = S3Store(
        root.bucket[5:], prefix=root.key, endpoint=server.url, client_options={"allow_http": True}
    )
    group = zarr.open_group(ObjectStore(s3, read_only=True), mode="r")
    assert np.array_equal(group["features/-2"][:IMAGES], expected.astype(np.float16))
    spec = {
        "driver": "zarr3",
        "kvstore": {
            "driver": "s3", "bucket": root.bucket[5:], "path": f"{root.key}/features/-2/",
            "endpoint": server.url, "aws_region": "us-east-1",
            "aws_credentials": {"type": "environment"},
        },
    }  # fmt: skip
    array = tensorstore.open(spec, read=True).result()
    assert np.array_equal(array[:IMAGES].read().result(), expected.astype(np.float16))
