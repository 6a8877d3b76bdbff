"""`align filter`: what it writes, what it says, what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from .conftest import Align

LINES = [
    {"id": 1, "image": "a.jpg", "caption": "a red square on a big lawn"},
    {"id": 2, "image": "b.jpg", "caption": "A red   square on a big lawn"},
    {"id": 3, "image": "c.jpg", "caption": "A red square, on a very big lawn!"},
    {"id": 4, "image": "d.jpg", "caption": "please Click here to see more"},
    {"id": 5, "image": "e.jpg", "caption": "too short"},
    {"id": 6, "image": "f.jpg", "caption": " "},
    {"id": 7, "video": "g.mp4", "caption": "a film of a red square"},
    {"id": 8, "image": "h.jpg", "caption": "word " * 61},
    {"id": 9, "image": "i.jpg", "caption": "we sell a blue square"},
]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in LINES))
    return path


def kept(path: Path) -> list[int]:
    return [json.loads(line)["id"] for line in path.read_text().splitlines()]


def test_the_recipes_filters_go_without_saying(data: Path, tmp_path: Path, align: Align) -> None:
    out = tmp_path / "out.jsonl"
    done = align("filter", "--data", data, "--out", out, "--json")
    assert done.code == 0
    assert kept(out) == [1, 3, 9]
    assert done.document == {
        "out": str(out),
        "dropped": str(tmp_path / "out.dropped.jsonl"),
        "image_root": str(tmp_path),
        "found": 9,
        "kept": 3,
        "counts": {
            "unusable": 1,
            "empty": 1,
            "too short": 1,
            "too long": 1,
            "spam": 1,
            "duplicate": 1,
            "near duplicate": 0,
        },
        "first": {
            "unusable": ["7"],
            "empty": ["6"],
            "too short": ["5"],
            "too long": ["8"],
            "spam": ["4"],
            "duplicate": ["2"],
            "near duplicate": [],
        },
    }
    table = [line.split() for line in done.err.splitlines()]
    assert ["duplicate", "1", "11.11%", "2"] in table
    assert done.err.endswith(
        f"{out}: 3 of 9 records; the others in {tmp_path}/out.dropped.jsonl\n"
        f"use it with --data {out} --images {tmp_path}\n"
    )


def test_every_filter_has_its_option(data: Path, tmp_path: Path, align: Align) -> None:
    out = tmp_path / "out.jsonl"
    common = ("filter", "--data", data, "--out", out, "--force")
    off = ("--min-length", 0, "--max-length", 0, "--keep-spam", "--keep-duplicates")
    for options, expected in (
        (off, [1, 2, 3, 4, 5, 8, 9]),
        ((*off, "--spam", "WE  sell", "--spam", "see more"), [1, 2, 3, 5, 8]),
        ((*off, "--min-length", 3), [1, 2, 3, 4, 8, 9]),
        ((*off, "--max-length", 2), [5]),
        ((*off, "--near", 0.8), [1, 4, 5, 8, 9]),
        ((*off[:-1], "--near", 1), [1, 3, 4, 5, 8, 9]),
        ((*off, "--tokenizer", "tiny", "--min-length", 40), [8]),
        (("--spam", "we sell"), [1, 3]),
    ):
        assert align(*common, *map(str, options)).code == 0
        assert kept(out) == expected, options


@pytest.mark.parametrize(
    ("options", "code", "error"),
    [
        (["--out", "{data}"], 2, "{data}: is one of the --data files; choose another place"),
        (["--out", "{tmp}/o.json"], 2, "JSON lines are written; name it *.jsonl"),
        (["--out", "{tmp}/o.jsonl", "--min-length", "70"], 2, "min_length=70"),
        (["--out", "{tmp}/o.jsonl", "--near", "2"], 2, "--near"),
        (["--out", "{tmp}/o.jsonl", "--min-length", "50"], 1, "none of 9 records passes"),
        (["--out", "{tmp}/o.jsonl", "--data", "{tmp}/none.json"], 1, "none.json does not exist"),
        (["--out", "{tmp}/o.jsonl", "--tokenizer", "/none"], 2, "--tokenizer /none: cannot be"),
        ([], 2, "Missing option '--out'"),
    ],
)
def test_mistakes_are_one_line(
    data: Path, tmp_path: Path, align: Align, options: list[str], code: int, error: str
) -> None:
    places = {"data": data, "tmp": tmp_path}
    done = align("filter", "--data", data, *(part.format(**places) for part in options))
    assert done.code == code
    assert done.err.splitlines()[-1].startswith("error: ")
    assert error.format(**places) in done.err.splitlines()[-1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl"]


def test_what_passes_is_trained_on(demo: Path, tmp_path: Path, align: Align) -> None:
    """A store of the whole data, and a run on what is left of it."""
    out = tmp_path / "short.jsonl"
    source = demo / "data" / "train.jsonl"
    done = align("filter", "--data", source, "--out", out, "--keep-duplicates", "--json")
    assert done.code == 0
    shown = align(
        *("show", "--config", "demo", "--features", demo / "store.zarr", "-n", 2, "--json"),
        *(f"data.files=[{out}]", f"data.images={done.document['image_root']}"),
    )
    assert shown.code == 0
    ids = [json.loads(line)["id"] for line in out.read_text().splitlines()]
    assert ids == [json.loads(line)["id"] for line in source.read_text().splitlines()][: len(ids)]
    assert {sample["id"] for sample in shown.document["samples"]} <= set(ids)
