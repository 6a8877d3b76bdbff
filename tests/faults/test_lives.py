"""Random lives of a store: everything that can happen to one, in any order, against a model.

A life extracts (also with another folder's images), is stopped at random publications, loses and
changes images, is damaged, verified, repaired, collected, converted to other codecs and through
HDF5, copied and moved. The model knows which image each key last meant. After every step:

- a key has the features of that image, to the error of the codecs that they went through, or it is
  in the ledger, and then only where its image could not be read when it had to be;
- a reader that was opened before the step still gives right values, or one clear error;
- `verify` finds nothing after what nobody disturbed, and repairing mends all of one damage.

`python -m tests.faults.test_lives --seeds 200` runs more of them and prints what they came to.
"""

from __future__ import annotations

import argparse
import functools
import os
import random
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import featcache
from featcache import encoders, repair, worker
from featcache.convert import convert
from featcache.errors import (
    CorruptStoreError,
    FeatcacheError,
    ImageError,
    IncompleteStoreError,
)
from featcache.extract import ExtractOptions, extract
from featcache.gc import collect
from featcache.images import decode, digest
from featcache.journal import Journal
from featcache.layout import Status
from featcache.store import Store
from featcache.verify import verify
from tests.faults.damage import delete, flip, truncate, zeros
from tests.support import Killed, Publications, write_captions, write_images

CODECS = ("fp16", "int8", "int4", "bf16", "fp8")
ERROR = {"fp16": 1e-3, "bf16": 6e-3, "int8": 0.02, "fp8": 0.06, "int4": 0.2}
"""Relative L2 error that a codec may add; measured up to 3e-4, 2e-3, 8e-3, 3e-2, 0.12."""
SEEDS = 15
STEPS = 14


class Life:
    """One store, its images, and what must be true of them."""

    def __init__(
        self, folder: Path, encoder_dir: Path, publications: Publications, seed: int
    ) -> None:
        self.chance = random.Random(seed)
        self.folder, self.publications = folder, publications
        self.codecs = [CODECS[seed % len(CODECS)]]
        self.encoder = encoders.load_encoder(str(encoder_dir), layers=("-2",))
        write_images(folder / "pool", 10, seed)
        self.pool = [path.read_bytes() for path in sorted((folder / "pool").iterdir())]
        self.pool += [b"no image", self.pool[0][:60]]
        self.exact: dict[bytes, torch.Tensor | str] = {
            digest(data): self._exact(data) for data in self.pool
        }
        self.sets = {}
        for name in "ab":
            keys = [f"{name}{i}.png" for i in range(7)]
            (folder / name).mkdir()
            self.sets[folder / name] = (keys, write_captions(folder / f"{name}.jsonl", keys))
        self.options = ExtractOptions(
            model=str(encoder_dir), data=(), out=folder / "store.zarr", codec=self.codecs[0],
            shard_images=self.chance.choice([1, 2, 3, 5]), batch_size=2, max_failures=1.0,
        )  # fmt: skip
        self.means: dict[str, set[bytes | None]] = {}
        """Digests that a key may mean, None for a file that could not be read."""
        self.unsure: set[str] = set()
        """Keys that a stopped extraction may have given another meaning, or none."""
        self.may_lose: set[bytes] = set()
        """Images whose stored bytes were damaged."""
        self.damaged = self.interrupted = False
        self.outcomes: Counter[str] = Counter()
        self.moves = 0
        for _ in range(8):
            self.change()

    @property
    def out(self) -> Path:
        return self.options.out

    def _exact(self, data: bytes) -> torch.Tensor | str:
        try:
            pixels = torch.from_numpy(self.encoder.preprocess(decode(data)[0]))[None]
        except ImageError as error:
            return error.reason
        return self.encoder.encode(encoders.Pixels(pixels)).features["-2"][0].float()

    # ------------------------------------------------------------------------------------- checks

    def right(self, found: torch.Tensor, image: bytes) -> None:
        """Nearest to that image of all, and within what the codecs allow."""
        wanted = self.exact[image]
        assert isinstance(wanted, torch.Tensor)
        error = float((found - wanted).norm() / wanted.norm())
        assert error <= sum(ERROR[codec] for codec in self.codecs), (error, self.codecs)
        others = {
            other: float((found - values).norm())
            for other, values in self.exact.items()
            if isinstance(values, torch.Tensor)
        }
        assert min(others, key=lambda each: others[each]) == image

    def check(self) -> None:
        try:
            store = featcache.open(self.out)
        except IncompleteStoreError:
            return
        except CorruptStoreError:
            assert self.damaged
            return
        except FeatcacheError:
            assert not (self.out / "zarr.json").exists()
            return
        try:
            reader = store.reader()
        except CorruptStoreError:  # of channel values
            assert self.damaged
            return
        with reader:
            for key, may in self.means.items():
                (row,) = store.rows([key]).tolist()
                if row < 0:
                    self.has_none(store, key, may)
                    continue
                image = store.index.digests[row].tobytes()
                assert image in may, key
                try:
                    found = reader.read(np.array([row]), torch.float32)[0]
                except CorruptStoreError:
                    assert self.damaged
                    continue
                self.right(found, image)

    def has_none(self, store: Store, key: str, may: set[bytes | None]) -> None:
        if key in self.unsure:
            return
        failure = store.index.failures[key]
        reasons = {"missing" if image is None else self.exact[image] for image in may}
        lost = {image for image in may if image in self.may_lose}
        assert failure.reason in reasons or lost, (key, failure)
        if not lost:
            assert not any(isinstance(self.exact.get(i), torch.Tensor) for i in may if i), key

    def bad_rows(self, store: Store) -> set[bytes]:
        """Images whose stored bytes are wrong now, pooled ones too."""
        found = set()
        for problem in verify(self.out).problems:
            found |= {
                store.index.digests[row].tobytes() for row in problem.rows if row < store.num_rows
            }
        return found

    # -------------------------------------------------------------------------------------- steps

    def change(self) -> None:
        root = self.chance.choice(list(self.sets))
        there = sorted(root.iterdir())
        path = root / self.chance.choice(self.sets[root][0])
        kind = self.chance.choice(["write", "write", "write", "delete", "rename"])
        if kind == "write" or not there:
            path.write_bytes(self.chance.choice(self.pool))
        elif kind == "delete":
            self.chance.choice(there).unlink()
        else:
            self.chance.choice(there).rename(path)

    def extract(self, stop: bool = False) -> None:
        root = self.chance.choice(list(self.sets))
        keys, data = self.sets[root]
        limit = self.chance.choice([None, None, 2, 5])
        options = replace(
            self.options, data=(data,), image_root=root, limit=limit,
            batch_size=self.chance.choice([1, 2, 3]),
            shard_images=None if (self.out / "zarr.json").exists() else self.options.shard_images,
        )  # fmt: skip
        now: dict[str, bytes | None] = {}
        for key in keys[:limit]:
            path = root / key
            now[key] = digest(path.read_bytes()) if path.exists() else None
        for key, image in now.items():
            self.means.setdefault(key, {None})
            if stop or self.damaged:
                self.means[key] |= {image}
                self.unsure.add(key)
        if self.run("extract", lambda: extract(options), stop):
            for key, image in now.items():
                if image is not None:
                    self.means[key] = {image}
                    self.unsure.discard(key)
            self.interrupted = False

    def gc(self, stop: bool = False) -> None:
        self.run("gc", lambda: collect(self.out), stop)

    def verify(self) -> None:
        try:
            report = verify(self.out)
        except FeatcacheError:
            assert self.damaged or not self.out.exists() or not (self.out / "zarr.json").exists()
            return
        if not self.damaged and not self.interrupted:
            assert report.ok, [str(problem) for problem in report.problems]
        assert report.ok or self.damaged or self.interrupted
        self.damaged = self.damaged and not report.ok  # an extraction may have mended it

    def repair(self, stop: bool = False) -> None:
        if not (self.out / "zarr.json").exists() and not self.damaged:
            return
        if self.run("repair", lambda: repair.repair(self.out), stop):
            report = verify(self.out)
            assert report.ok, [str(problem) for problem in report.problems]
            self.damaged = False

    def damage(self) -> None:
        if self.damaged or self.interrupted or not (self.out / "zarr.json").exists():
            return
        try:
            store = featcache.open(self.out)
        except IncompleteStoreError:
            return
        kind = self.chance.choice([flip, truncate, delete, zeros])
        kind(self.out, self.chance)
        self.damaged = True
        self.outcomes["damage"] += 1
        self.may_lose |= self.bad_rows(store)

    def convert(self, stop: bool = False) -> None:
        codec = self.chance.choice([None, None, *CODECS])
        through = self.chance.random() < 0.5
        self.moves += 1
        new = self.folder / f"store{self.moves}.zarr"

        def work() -> None:
            source = self.out
            if through:
                source = new.with_suffix(".h5")
                convert(self.out, source, codec, force=True)
            convert(source, new, None if through else codec, force=True)

        done = self.run("convert", work, stop)
        if not done and stop:
            done = self.run("convert", work, False)
        if done:
            if codec is not None and codec != self.codecs[-1]:
                self.codecs.append(codec)
                if len(self.codecs) > 4:
                    self.codecs = [*self.codecs[:1], "int4", *self.codecs[-3:]]
            self.options = replace(self.options, out=new, codec=self.codecs[-1])
            self.damaged = self.interrupted = False
            # What was planned and not finished stayed behind.

    def move(self) -> None:
        if not (self.out / "zarr.json").exists():
            return
        self.moves += 1
        new = self.folder / f"moved{self.moves}.zarr"
        if self.chance.random() < 0.5:
            self.out.rename(new)
        else:
            shutil.copytree(self.out, new, ignore=shutil.ignore_patterns("lock"))
        self.options = replace(self.options, out=new)

    def run(self, name: str, work: Callable[[], object], stop: bool) -> bool:
        """Returns whether it ended; it may refuse what is damaged or unfinished."""
        reader = self.open_reader()
        self.interrupted |= stop
        after = self.chance.choice([0, 1, 2, 3, self.chance.randint(0, 40)]) if stop else None
        try:
            with self.publications.stopped(after=after):
                work()
        except Killed:
            self.outcomes[f"{name} stopped"] += 1
            return False
        except FeatcacheError as error:
            assert "\n" not in str(error)
            unfinished = isinstance(error, IncompleteStoreError) or self.interrupted
            missing = not (self.out / "zarr.json").exists()
            assert self.damaged or unfinished or missing, error
            self.outcomes[f"{name} refused"] += 1
            return False
        finally:
            if reader is not None:
                self.read_on(*reader)
        self.outcomes[name] += 1
        return True

    def open_reader(self) -> tuple[Store, featcache.FeatureReader] | None:
        try:
            store = featcache.open(self.out)
        except FeatcacheError:
            return None
        try:
            reader = store.reader(threads=2)
        except CorruptStoreError:  # of channel values
            assert self.damaged
            return None
        rows = np.flatnonzero(store.index.status == Status.OK)
        try:
            reader.read(rows[::2])  # some are checked, some files open
        except CorruptStoreError:
            assert self.damaged
        return store, reader

    def read_on(self, store: Store, reader: featcache.FeatureReader) -> None:
        """With a reader opened before a step."""
        with reader:
            rows = np.flatnonzero(store.index.status == Status.OK)
            for row in [*rows.tolist(), *rows.tolist()]:
                try:
                    found = reader.read(np.array([row, row]), torch.float32)
                except CorruptStoreError:
                    gone = self.damaged or bool(self.may_lose)
                    if not gone:
                        status = Journal.load(store.path).status[row]
                        assert status == Status.DROPPED, (row, status)
                    continue
                self.right(found[0], store.index.digests[row].tobytes())
                self.right(found[1], store.index.digests[row].tobytes())

    def step(self) -> str:
        chance = self.chance
        for _ in range(chance.choice([0, 0, 1, 3])):
            self.change()
        name = chance.choice(
            ["extract"] * 6 + ["gc"] * 4 + ["repair"] * 3 + ["convert"] * 3
            + ["damage"] * 3 + ["verify", "move"]
        )  # fmt: skip
        if name in ("damage", "verify", "move"):
            getattr(self, name)()
        else:
            getattr(self, name)(chance.random() < 0.4)
        self.check()
        return name

    def end(self) -> None:
        """Whatever happened: after a repair and extractions all is as it should be."""
        if self.damaged:
            self.repair()
        for root, (keys, data) in self.sets.items():
            options = replace(
                self.options, data=(data,), image_root=root,
                shard_images=None if (self.out / "zarr.json").exists() else 3,
            )  # fmt: skip
            extract(options)
            again = extract(options)
            assert again.new == 0
            for key in keys:
                if (root / key).exists():
                    self.means[key] = {digest((root / key).read_bytes())}
                    self.unsure.discard(key)
        collect(self.out)
        self.damaged = self.interrupted = False
        self.verify()
        self.check()


def one_life(
    folder: Path, encoder_dir: Path, publications: Publications, seed: int
) -> Counter[str]:
    life = Life(folder, encoder_dir, publications, seed)
    for _ in range(STEPS):
        life.step()
    life.end()
    return life.outcomes


def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Encoders are loaded once, and no file is synced."""
    load = functools.cache(encoders.load_encoder)

    def cached(name: str, **options: object) -> encoders.Encoder:
        options["layers"] = tuple(options["layers"])  # type: ignore[arg-type]
        return load(name, **options)  # type: ignore[arg-type]

    for module in (encoders, worker, repair):
        monkeypatch.setattr(module, "load_encoder", cached)
    monkeypatch.setattr(os, "fsync", lambda _: None)


@pytest.mark.parametrize("seed", range(SEEDS))
def test_a_life(
    encoder_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    quick(monkeypatch)
    one_life(tmp_path, encoder_dir, Publications(monkeypatch), seed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=100)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--encoder", type=Path, default=Path("featcache/assets/siglip-tiny"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    outcomes: Counter[str] = Counter()
    failed = []
    with pytest.MonkeyPatch.context() as monkeypatch:
        quick(monkeypatch)
        publications = Publications(monkeypatch)
        for seed in range(arguments.first, arguments.first + arguments.seeds):
            folder = Path(tempfile.mkdtemp())
            try:
                outcomes += one_life(folder, arguments.encoder, publications, seed)
            except Exception as error:
                import traceback

                last = traceback.extract_tb(error.__traceback__)
                where = " < ".join(f"{f.name}:{f.lineno}" for f in last[-4:][::-1])
                failed.append(seed)
                print(
                    f"seed {seed}: {type(error).__name__} {str(error)[:300]} [{where}]", flush=True
                )
            shutil.rmtree(folder)
    print(f"{arguments.seeds} lives, {sum(outcomes.values())} operations: {dict(outcomes)}")
    print(f"{len(failed)} failed: {failed}")


if __name__ == "__main__":
    main()
