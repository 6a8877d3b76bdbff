"""Extraction over hundreds of odd, damaged and hostile files: each accounted for once."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import featcache
from cli import console
from cli.featcache import group
from featcache.encoders import Encoder, Pixels, load_encoder
from featcache.errors import ImageError
from featcache.images import digest, load_image, read_bytes
from featcache.layout import Status
from featcache.samples import IMAGE_SUFFIXES
from tests.support import write_captions
from tests.support_images import FEATURES, write_zoo

OUR_LINES = re.compile(
    r"(loading |scan: |encode: |skipped \d|\d+ images to encode: "
    r"|\S+\.zarr: \d+ of \d+ images have features "
    r"|without features: |error: more images failed than allowed; |\d+ images without features)"
)
"""What `featcache extract` may print on stderr."""
REASONS = {status.reason for status in Status} - {"ok", "unused"}


@dataclass(frozen=True, slots=True)
class Zoo:
    """folder: the images. outcomes: what each name may come to."""

    folder: Path
    outcomes: dict[str, frozenset[str]]


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    folder = tmp_path_factory.mktemp("zoo")
    outcomes = write_zoo(folder)
    assert len(outcomes) >= 400
    return Zoo(folder, outcomes)


class Command:
    """Runs `featcache` and checks what every run of it must keep."""

    def __init__(self, capfd: pytest.CaptureFixture[str]) -> None:
        self._capfd = capfd

    def __call__(self, *argv: str | Path) -> tuple[int, dict[str, Any]]:
        """Exit code and document; nothing else is on stdout, no stranger's line on stderr."""
        self._capfd.readouterr()
        code = console.run(group, [*map(str, argv), "--json"])
        out, err = self._capfd.readouterr()
        assert out.count("\n") == 1
        if argv[0] == "extract":
            strange = [line for line in err.splitlines() if not OUR_LINES.match(line)]
            assert strange == []
        return code, json.loads(out)


@pytest.fixture
def command(capfd: pytest.CaptureFixture[str]) -> Command:
    return Command(capfd)


def ledger(command: Command, store: Path) -> dict[str, tuple[str, str]]:
    """The reason and detail of each image without features; no image twice."""
    code, document = command("failures", store)
    assert code == 0
    entries = {f["key"]: (f["reason"], f["detail"]) for f in document["failures"]}
    assert len(entries) == len(document["failures"])
    return entries


def assert_accounted(
    command: Command, out: Path, document: dict[str, Any], expected: dict[str, frozenset[str]]
) -> None:
    """Each image has features or one reason with a detail, as expected; the counts agree."""
    failures = ledger(command, out)
    names = list(expected)
    store = featcache.open(out)
    rows = dict(zip(names, store.rows(names).tolist(), strict=True))
    came_to = {name: FEATURES if rows[name] >= 0 else failures[name][0] for name in names}
    wrong = {name: came_to[name] for name in names if came_to[name] not in expected[name]}
    assert wrong == {}
    assert failures.keys() == {name for name in names if rows[name] < 0}
    for reason, detail in failures.values():
        assert reason in REASONS
        assert detail and "\n" not in detail.replace(str(out.parent), "") and " at 0x" not in detail
    counts = Counter(came_to.values())
    with_features = counts.pop(FEATURES)
    assert (document["images"], document["features"]) == (len(names), with_features)
    assert document["failures"] == counts
    with store.reader() as reader:
        features = reader.read(np.array([row for row in rows.values() if row >= 0]))
    assert features.isfinite().all()
    assert (features.float().abs().amax(dim=(1, 2)) > 0.01).all()


def distinct(folder: Path, names: Sequence[str]) -> int:
    """Different images among those files that can be read."""
    found = set()
    for name in names:
        try:
            found.add(digest(read_bytes(folder / name)))
        except ImageError:
            continue
    return len(found)


def encode_alone(encoder: Encoder, path: Path) -> torch.Tensor:
    """The features of one image, stored type."""
    pixels = torch.from_numpy(encoder.preprocess(load_image(path)))[None]
    return encoder.encode(Pixels(pixels)).features["-2"][0].half()


def test_a_folder(zoo: Zoo, command: Command, encoder_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "store.zarr"
    expected = {
        name: outcomes
        for name, outcomes in zoo.outcomes.items()
        if Path(name).suffix.lower() in IMAGE_SUFFIXES
    }
    # Names that are no UTF-8 cannot be keys: they are skipped, with their reason.
    foreign = Path(str(zoo.folder), "caf\udce9.png")
    foreign.write_bytes((zoo.folder / "grey16.png").read_bytes())
    argv = ["extract", "--model", encoder_dir, "--data", zoo.folder, "--out", out,
            "--batch-size", "1"]  # fmt: skip
    try:
        code, first = command(*argv)
        assert (code, first["ok"]) == (1, False)
        assert [count for count, _ in first["skipped"].values()] == [1]
        assert first["new"] == distinct(zoo.folder, list(expected))
        assert_accounted(command, out, first, expected)

        share = sum(first["failures"].values()) / first["images"]
        before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
        code, again = command(*argv, "--max-failures", f"{share + 1e-9:.12f}")
        assert (code, again["ok"], again["new"]) == (0, True, 0)
        code, _ = command(*argv, "--max-failures", f"{share - 1e-9:.12f}")
        assert code == 1
        changed = {path.relative_to(out) for path, time in before.items()
                   if not path.exists() or path.stat().st_mtime_ns != time}  # fmt: skip
        assert changed <= {Path("journal/lock")}
        assert {key: again[key] for key in ("images", "features", "failures")} == {
            key: first[key] for key in ("images", "features", "failures")
        }
    finally:
        foreign.unlink()

    # Where there are features, they are those of the image alone.
    encoder = load_encoder(str(encoder_dir))
    store = featcache.open(out)
    names = [name for name, row in zip(expected, store.rows(list(expected)), strict=True)
             if row >= 0 and name != "warns-bomb.png"]  # fmt: skip
    with store.reader() as reader:
        features = reader.read(store.rows(names))
    for name, stored in zip(names, features, strict=True):
        assert torch.equal(stored, encode_alone(encoder, zoo.folder / name)), name


def test_a_manifest(zoo: Zoo, command: Command, encoder_dir: Path, tmp_path: Path) -> None:
    """Names every file, also those that a folder's listing leaves out, and some that are none."""
    expected = zoo.outcomes | {
        "folder.jpg": frozenset(("unreadable",)),
        "grey16.png/inside.png": frozenset(("unreadable",)),
        "y" * 5000 + ".png": frozenset(("unreadable",)),
        "none.png": frozenset(("missing",)),
    }
    unusable = ["../escape.png", "caf\udce9.png", "nul\0.png"]
    data = write_captions(tmp_path / "zoo.jsonl", [*expected, *unusable])
    out = tmp_path / "store.zarr"
    code, document = command(
        "extract", "--model", encoder_dir, "--data", data, "--images", zoo.folder,
        "--out", out, "--max-failures", "1", "--workers", "4",
    )  # fmt: skip
    assert (code, document["ok"]) == (0, True)
    assert sum(count for count, _ in document["skipped"].values()) == len(unusable)
    assert document["new"] == distinct(zoo.folder, list(expected))
    assert_accounted(command, out, document, expected)

    # The same bytes under many names are stored once.
    store = featcache.open(out)
    same = ["with space.png", "new\nline.png", "日本語.png", "folder.jpg/inside.png", "copy.jpg"]
    assert len(set(store.rows(same).tolist())) == 1
    assert store.rows(["link.png"]) == store.rows(["grey16.png"])
