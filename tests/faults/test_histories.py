"""Random histories of a folder and its store, against a plain model of what must then be true.

Files are added, changed, changed back, truncated, renamed, swapped, copied and deleted; extractions
and collections run, are stopped at a random publication, and have files of the store damaged in
between. After every extraction that ends, each key of the data has the features of its file's
bytes, or the right entry in the ledger. A collection, ended or stopped, takes no key's features.
"""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import featcache
from featcache.encoders import load_encoder
from featcache.errors import ImageError, IncompleteStoreError
from featcache.extract import ExtractOptions, extract
from featcache.gc import collect
from featcache.images import decode, digest
from featcache.journal import Journal, merge
from featcache.layout import Status, StoreInfo
from tests.support import Killed, Publications, write_captions, write_images

NAMES = [f"{i}.png" for i in range(8)]


class World:
    """A folder of images that changes at random, and what an extraction of it must give."""

    def __init__(self, folder: Path, encoder_dir: Path, seed: int) -> None:
        self.random = random.Random(seed)
        self.images = folder / "images"
        self.images.mkdir()
        write_images(folder / "pool", 12, seed)
        self.pool = [path.read_bytes() for path in sorted((folder / "pool").iterdir())]
        self.pool += [b"no image", self.pool[0][:60]]
        self.encoder = load_encoder(str(encoder_dir))
        self.expected: dict[bytes, torch.Tensor | str] = {}
        for data in self.pool:
            self.features(data)

    def change(self) -> None:
        """One random change of one or two files."""
        there = sorted(self.images.iterdir())
        path = self.images / self.random.choice(NAMES)
        kind = self.random.choice(["write", "write", "delete", "rename", "swap", "copy"])
        if kind == "write" or not there:
            path.write_bytes(self.random.choice(self.pool))
        elif kind == "delete":
            self.random.choice(there).unlink()
        elif kind == "rename":
            self.random.choice(there).rename(path)
        else:
            a, b = self.random.choice(there), self.random.choice(there)
            first, second = a.read_bytes(), b.read_bytes()
            a.write_bytes(second)
            if kind == "swap":
                b.write_bytes(first)

    def features(self, data: bytes) -> torch.Tensor | str:
        """float16[P, D] of an image's bytes, or the ledger's reason."""
        if digest(data) not in self.expected:
            try:
                pixels = self.encoder.collate([self.encoder.preprocess(decode(data)[0])])
                self.expected[digest(data)] = self.encoder.encode(pixels).features["-2"][0].half()
            except ImageError as error:
                self.expected[digest(data)] = error.reason
        return self.expected[digest(data)]

    def check(self, out: Path, keys: list[str]) -> None:
        store = featcache.open(out)
        assert not Journal.load(out).pending
        with store.reader() as reader:
            for key in keys:
                path, rows = self.images / key, store.rows([key])
                if not path.exists():
                    # Cached features outlive their file; else the ledger has the key.
                    assert rows[0] >= 0 or key in store.index.failures
                    continue
                wanted = self.features(path.read_bytes())
                if isinstance(wanted, str):
                    assert rows[0] < 0, key
                    assert store.index.failures[key].reason == wanted, key
                else:
                    assert rows[0] >= 0, f"{key}: {store.reason(key)}"
                    torch.testing.assert_close(reader.read(rows)[0], wanted, rtol=2e-3, atol=1e-3)

    def check_rows(self, out: Path) -> None:
        """Whatever key the index knows reads as the image of its row.

        But for rows of a shard that was damaged, and had lost an image when it was written again:
        an index older than that still believes in them.
        """
        store = featcache.open(out)
        lost = [status not in (Status.OK, Status.DROPPED) for status in Journal.load(out).status]
        with store.reader() as reader:
            for key in sorted(store.index.keys()):
                for row in store.rows([key]).tolist():
                    if row >= 0 and not lost[row]:
                        wanted = self.expected[store.index.digests[row].tobytes()]
                        found = reader.read(np.array([row]))[0]
                        assert isinstance(wanted, torch.Tensor)
                        torch.testing.assert_close(found, wanted, rtol=2e-3, atol=1e-3)

    def collect(self, out: Path, publications: Publications) -> None:
        """A collection of whatever is there, or the beginning of one."""
        if not (out / "zarr.json").exists():
            return
        stop = self.random.random() < 0.5
        before = Journal.load(out)
        try:
            with publications.stopped(after=self.random.randint(0, 40) if stop else None):
                collect(out)
        except IncompleteStoreError:
            assert before.pending or StoreInfo.load(out).index is None
            return
        except Killed:
            self.check_rows(out)
            return
        self.check_rows(out)
        store, after = featcache.open(out), Journal.load(out)
        means = merge(before.plans).rows
        live = {row for row in means.values() if row >= 0 and before.status[row] == Status.OK}
        assert set(np.flatnonzero(after.status == Status.OK).tolist()) == live
        for key, row in means.items():
            assert store.rows([key]).tolist() == [row if row in live else -1]
        assert not after.pending


@pytest.mark.parametrize("seed", range(12))
def test_random_history(
    encoder_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    world = World(tmp_path, encoder_dir, seed)
    chance = world.random
    data = write_captions(tmp_path / "data.jsonl", NAMES)
    options = ExtractOptions(
        model=str(encoder_dir), data=(data,), image_root=world.images, out=tmp_path / "store.zarr",
        shard_images=chance.choice([1, 2, 3]), batch_size=2, max_failures=1.0,
    )  # fmt: skip
    publications = Publications(monkeypatch)
    for _ in range(10):
        for _ in range(chance.randint(0, 4)):
            world.change()
        shards = sorted(options.out.glob("features/*/c/*/0/0"))
        if shards and chance.random() < 0.2:
            chance.choice(shards).write_bytes(b"short")
        limit = chance.choice([None, None, 2, 5])
        now = replace(options, limit=limit, batch_size=chance.choice([1, 2, 3]))
        if chance.random() < 0.4:
            world.collect(options.out, publications)
        if chance.random() < 0.4:
            with publications.stopped(after=chance.randint(0, 40)):
                try:
                    extract(now)
                except Killed:
                    continue
        else:
            extract(now)
        world.check(options.out, NAMES[:limit])
