"""200 damaged stores: each damage is named, none is read as something else, and nearly all mended.

`python -m tests.faults.test_damage` prints the table of docs/reliability.md.
"""

from __future__ import annotations

import functools
import os
import random
import shutil
import tempfile
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

import featcache
from featcache import encoders, extract, repair, worker
from featcache.errors import FeatcacheError, StoreError
from featcache.extract import ExtractOptions
from featcache.verify import verify
from tests.faults.damage import KINDS
from tests.support import feature_files, write_captions, write_images

CODECS_USED = ("fp16", "int8", "bf16", "fp8", "int4")
CASES = [
    (kind, number, CODECS_USED[i % len(CODECS_USED)])
    for i, (kind, number) in enumerate(
        (kind, number) for kind, (_, count) in KINDS.items() for number in range(count)
    )
]
COUNT = 8


@dataclass(frozen=True)
class Whole:
    """An undamaged store: two layers, two generations, an image that failed and one that is gone.

    files: the bytes of its data files. rows: of `keys`. values: {layer: stored bytes of all rows}.
    """

    options: ExtractOptions
    keys: list[str]
    files: dict[str, bytes]
    rows: list[int]
    values: dict[str, list[bytes]]
    failures: list[object]


def read(store_dir: Path, keys: list[str]) -> tuple[list[int], dict[str, list[bytes]]]:
    """As training does: rows of keys, then every row of every layer, each checked once."""
    store = featcache.open(store_dir)
    rows = store.rows(keys)
    found: dict[str, list[bytes]] = {}
    for layer in store.layers:
        with store.reader(layer, check="once") as reader:
            stored = reader.read_stored(rows[rows >= 0])
            values = stored.decode().float().numpy()
        found[layer] = [row.tobytes() for row in values]
    return rows.tolist(), found


def make(folder: Path, encoder_dir: Path, codec: str) -> Whole:
    write_images(folder / "images", COUNT)
    (folder / "images" / "0004.png").write_bytes(b"not an image")
    keys = [f"{i:04d}.png" for i in range(COUNT)] + ["none.png"]
    options = ExtractOptions(
        model=str(encoder_dir), data=(write_captions(folder / "c.jsonl", keys),),
        image_root=folder / "images", out=folder / "store.zarr", layers=("-2", "last"),
        codec=codec, shard_images=3, batch_size=2, max_failures=1.0,
    )  # fmt: skip
    extract.extract(replace(options, limit=5))
    extract.extract(options)
    rows, values = read(options.out, keys)
    failures = featcache.open(options.out).failures()
    assert len(failures) == 2
    return Whole(options, keys, feature_files(options.out), rows, values, list(failures))


def cache_encoders(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading the same encoder 400 times is not what is tested."""
    load = functools.cache(encoders.load_encoder)

    def cached(name: str, **options: object) -> encoders.Encoder:
        options["layers"] = tuple(options["layers"])
        return load(name, **options)

    monkeypatch.setattr(worker, "load_encoder", cached)
    monkeypatch.setattr(repair, "load_encoder", cached)


@pytest.fixture(scope="module", autouse=True)
def quick() -> object:
    """Encoders are loaded once, and no file is synced: 200 cases in half a minute."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        cache_encoders(monkeypatch)
        monkeypatch.setattr(os, "fsync", lambda _: None)
        yield


@pytest.fixture(scope="module")
def wholes(tmp_path_factory: pytest.TempPathFactory, encoder_dir: Path) -> dict[str, Whole]:
    return {
        codec: make(tmp_path_factory.mktemp(codec), encoder_dir, codec) for codec in CODECS_USED
    }


def names(problem_path: str, damaged: list[str]) -> bool:
    """Whether a problem's place is one of the damaged files, its array, or below it."""
    return any(
        problem_path == path
        or path.startswith(f"{problem_path}/")
        or problem_path.startswith(f"{path}/")
        for path in damaged
    )


def one_line(error: FeatcacheError) -> bool:
    return bool(str(error)) and "\n" not in str(error) and "Traceback" not in str(error)


def unchanged(store: Path, whole: Whole) -> bool:
    """Reading gives what was stored, or an error of one line."""
    try:
        rows, values = read(store, whole.keys)
    except FeatcacheError as error:
        assert one_line(error)
        return True
    return rows == whole.rows and values == whole.values


def one_case(whole: Whole, kind: str, number: int, folder: Path) -> str:
    """Damage a copy, and look. Returns how it ended: "mended", or why it could not be."""
    store = shutil.copytree(whole.options.out, folder / "damaged.zarr")
    damaged = KINDS[kind][0](store, random.Random(f"{kind} {number}"))
    untouched = shutil.copytree(store, folder / "rerun.zarr")
    refused = None

    try:
        report = verify(store)
        assert not report.ok, damaged
        assert any(names(problem.where, damaged) for problem in report.problems), (
            damaged,
            [str(problem) for problem in report.problems],
        )
    except StoreError as error:
        refused = error
        assert one_line(error), damaged
    assert unchanged(store, whole), damaged

    try:
        extract.extract(replace(whole.options, out=untouched, shard_images=None))
    except FeatcacheError as error:
        assert one_line(error), damaged
    assert unchanged(untouched, whole), damaged

    if refused is not None:
        with pytest.raises(StoreError):
            repair.repair(store)
        return f"refused: {str(refused).replace(str(store), 'STORE')}"
    mended = repair.repair(store)
    if not mended.ok:
        assert unchanged(store, whole), damaged
        return f"not mended: {mended.problems[0].what}"
    assert verify(store).ok
    assert feature_files(store) == whole.files, damaged
    assert read(store, whole.keys) == (whole.rows, whole.values), damaged
    assert list(featcache.open(store).failures()) == whole.failures
    return "mended"


@pytest.mark.parametrize(("kind", "number", "codec"), CASES)
def test_damage(
    wholes: dict[str, Whole], tmp_path: Path, kind: str, number: int, codec: str
) -> None:
    outcome = one_case(wholes[codec], kind, number, tmp_path)
    if kind == "journal deleted":
        assert "is missing, and so is its second copy" in outcome
    elif kind == "original and copy deleted":
        # Channel values can be measured again while the images are there.
        assert outcome == "mended" or "second copy" in outcome
    elif kind == "newer format":
        assert outcome == "mended" or "has store format 4" in outcome
    else:
        assert outcome == "mended"


def test_two_hundred_cases() -> None:
    assert len(CASES) == 200


def main() -> None:
    folder = Path(tempfile.mkdtemp())
    with pytest.MonkeyPatch.context() as monkeypatch:
        cache_encoders(monkeypatch)
        wholes = {}
        for codec in CODECS_USED:
            wholes[codec] = make(folder / codec, Path("tiny"), codec)
        outcomes: dict[str, Counter[str]] = {kind: Counter() for kind in KINDS}
        for i, (kind, number, codec) in enumerate(CASES):
            (folder / str(i)).mkdir()
            outcomes[kind][one_case(wholes[codec], kind, number, folder / str(i))] += 1
    for kind, found in outcomes.items():
        print(f"{kind}: {sum(found.values())} cases, {dict(found)}")
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
