"""What passes the caption filters is what the data file says, and what does not is named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from align.data import filters
from align.data.filters import REASONS, FilterConfig, FilterResult, filter_records
from align.errors import DataError
from featcache.errors import ConfigError, ManifestError
from featcache.manifests import Record, read_manifest
from tests.support_inputs import write_tar

Jsonl = Callable[[Path, list[dict[str, Any]]], Path]
ANY = FilterConfig(min_length=0, max_length=None, spam=(), duplicates=True)


def read_lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def captions(*texts: str) -> list[dict[str, Any]]:
    return [{"id": f"c{i}", "images": [f"{i}.jpg"], "caption": t} for i, t in enumerate(texts)]


@pytest.fixture
def sieve(tmp_path: Path, jsonl: Jsonl) -> Callable[..., dict[str, tuple[str, str]]]:
    """Filters captions; gives reason and detail of those that are dropped, by id."""

    def run(config: FilterConfig, *texts: str) -> dict[str, tuple[str, str]]:
        data = jsonl(tmp_path / "in.jsonl", captions(*texts))
        result = filter_records([data], None, tmp_path / "out.jsonl", config, force=True)
        dropped = read_lines(result.dropped)
        kept = [record["id"] for record in read_lines(result.out)]
        assert sorted(kept + [each["id"] for each in dropped]) == [
            f"c{i}" for i in range(len(texts))
        ]
        return {each["id"]: (each["reason"], each["detail"]) for each in dropped}

    return run


Sieve = Callable[..., dict[str, tuple[str, str]]]


def test_length_in_words(sieve: Sieve) -> None:
    config = FilterConfig(min_length=2, max_length=3)
    assert sieve(config, "one", "one two", "one  two\nthree", "a b c d") == {
        "c0": ("too short", "1 words"),
        "c3": ("too long", "4 words"),
    }


def test_length_in_tokens(sieve: Sieve) -> None:
    from transformers import AutoTokenizer

    from align.llm import find_llm

    texts = ("a red circle", "zyxwvutsrq", "a red circle " * 9, "<|image_pad|>")
    tokenizer = AutoTokenizer.from_pretrained(find_llm("tiny"))
    counts = [
        len(tokenizer(t.strip(), add_special_tokens=False, split_special_tokens=True).input_ids)
        for t in texts
    ]
    least, most = counts[0], counts[1]
    assert least < most < counts[2] and counts[3] > 1  # a spelled-out special token is text
    dropped = sieve(FilterConfig(min_length=least + 1, max_length=most, tokenizer="tiny"), *texts)
    assert dropped["c0"] == ("too short", f"{least} tokens")
    assert dropped["c2"] == ("too long", f"{counts[2]} tokens")
    assert "c1" not in dropped


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("a cat, WATERMARK here", "WATERMARK"),
        ("a stock\n photo of a cat", "stock photo"),
        ("Download now", "Download"),
        ("click!", "click"),
        ("a clicking beetle", None),
        ("the photo stock", None),
        ("watermarks", None),
        ("buy at $$$ only", "$$$"),
        ("buy at $$$5", None),
        ("c++ code", "C++"),
    ],
)
def test_spam(sieve: Sieve, text: str, found: str | None) -> None:
    config = FilterConfig(min_length=0, spam=(*filters.SPAM, "$$$", "C++"))
    dropped = sieve(config, text, "a cat")
    if found is None:
        assert dropped == {}
    else:
        reason, detail = dropped["c0"]
        assert (reason, detail.casefold()) == ("spam", found.casefold())
        assert dropped.keys() == {"c0"}


def test_duplicates_name_the_first(sieve: Sieve) -> None:
    texts = ("a red cat", "A  red\tcat", "a cat, red!", "a red dog", "a red cat")
    exact = FilterConfig(min_length=0)
    assert sieve(exact, *texts) == {"c1": ("duplicate", "c0"), "c4": ("duplicate", "c0")}
    near = FilterConfig(min_length=0, near=1)
    assert sieve(near, *texts)["c2"] == ("near duplicate", "c0")
    nearer = FilterConfig(min_length=0, near=0.5)
    assert sieve(nearer, *texts)["c3"] == ("near duplicate", "c0")
    assert sieve(ANY, *texts) == {}


def test_the_first_reason_counts_and_what_is_dropped_repeats_nothing(sieve: Sieve) -> None:
    config = FilterConfig(min_length=2, max_length=4, near=0.5)
    assert sieve(config, "click", "one two click", "one two", "one two three") == {
        "c0": ("too short", "1 words"),
        "c1": ("spam", "click"),
        "c3": ("near duplicate", "c2"),
    }


@pytest.mark.parametrize("chunk", [1, 2, 4096])
def test_chunks_do_not_show(sieve: Sieve, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(filters, "CHUNK", chunk)
    config = FilterConfig(min_length=2, near=0.6)
    assert sieve(config, "a b c", "a b c d", "x", "a  B c", "e f") == {
        "c1": ("near duplicate", "c0"),
        "c2": ("too short", "1 words"),
        "c3": ("duplicate", "c0"),
    }


MIXED: list[dict[str, Any]] = [
    {
        "id": "llava",
        "image": ["a/../1.jpg", "2.jpg"],
        "conversations": [
            {"from": "gpt", "value": "dropped by the reader"},
            {"from": "human", "value": "<image>\n<image>\nWhat?"},
            {"from": "gpt", "value": "Two cats \u2603 on a sofa"},
        ],
        "width": 1.5,
    },
    {"id": 7, "image": "nan", "conversations": [{"from": "human", "value": "Hi."}] * 2},
    {"images": ["3.jpg"], "caption": "  A cat without an id  ", "source": None},
    {"id": "film", "video": "1.mp4", "caption": "a film of a cat"},
    {"id": "mute", "image": "4.jpg", "caption": " "},
]


def without_origin(records: list[Record]) -> list[tuple[object, ...]]:
    return [(r.id, r.images, r.turns, r.source) for r in records]


def test_records_are_read_again_as_they_were(tmp_path: Path) -> None:
    (tmp_path / "in.json").write_text(json.dumps(MIXED))
    out = tmp_path / "out.jsonl"
    result = filter_records([tmp_path / "in.json"], None, out, ANY)
    assert read_lines(out) == [MIXED[0], MIXED[2]]
    assert read_lines(tmp_path / "out.dropped.jsonl") == [
        {"id": "7", "reason": "empty", "detail": "the caption is empty", "origin": "in.json[1]"},
        {"id": "film", "reason": "unusable", "detail": "has a video", "origin": "in.json[3]"},
        {"id": "mute", "reason": "empty", "detail": "the caption is empty", "origin": "in.json[4]"},
    ]
    before = read_manifest([tmp_path / "in.json"]).records
    after = read_manifest([out]).records
    assert without_origin(after)[0] == without_origin(before)[0]
    assert without_origin(after)[1][1:] == without_origin(before)[2][1:]
    assert (result.found, result.kept, result.image_root) == (5, 2, tmp_path)
    assert list(result.counts) == list(REASONS)
    assert result.counts["empty"] == 2 and result.first["empty"] == ["7", "mute"]


def test_a_tars_records_keep_their_keys(tmp_path: Path) -> None:
    """JSON may name what lies in a tar, so extraction and training read the same images."""
    members = [("01.jpg", b"x"), ("01.txt", b"a cat in a tar"), ("02.jpg", b"y"), ("02.txt", b"b")]
    tar = write_tar(tmp_path / "t.tar", members)
    filter_records([tar], tmp_path, tmp_path / "out.jsonl", FilterConfig(min_length=2))
    (before, _) = read_manifest([tar], tmp_path).records
    (after,) = read_manifest([tmp_path / "out.jsonl"], tmp_path).records
    assert without_origin([after]) == without_origin([before])
    assert after.images == ("t.tar/01.jpg",)


def test_several_files_count_as_one(tmp_path: Path, jsonl: Jsonl) -> None:
    jsonl(tmp_path / "a.jsonl", captions("a cat"))
    jsonl(tmp_path / "b.jsonl", [{"id": "b", "image": "b.jpg", "caption": "A cat"}])
    out = tmp_path / "out.jsonl"
    files = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    result = filter_records(files, None, out, FilterConfig(min_length=0))
    assert result.counts["duplicate"] == 1
    assert read_lines(result.dropped)[0]["detail"] == "c0"


def test_progress_is_told(tmp_path: Path, jsonl: Jsonl, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(filters, "CHUNK", 2)
    data = jsonl(tmp_path / "in.jsonl", captions("a", "b", "c"))
    told: list[int] = []
    filter_records([data], None, tmp_path / "out.jsonl", ANY, on_progress=told.append)
    assert told == [2, 3]


# --------------------------------------------------------------------------------------- mistakes


def run(tmp_path: Path, out: str, config: FilterConfig = ANY) -> FilterResult:
    return filter_records([tmp_path / "in.jsonl"], None, tmp_path / out, config)


def test_files_that_are_there_are_not_replaced(tmp_path: Path, jsonl: Jsonl) -> None:
    data = jsonl(tmp_path / "in.jsonl", captions("a cat"))
    with pytest.raises(ConfigError, match=r"in.jsonl: is one of the --data files"):
        filter_records([data], None, data, ANY, force=True)
    for name in ("out.jsonl", "out.dropped.jsonl"):
        (tmp_path / name).write_text("mine")
        with pytest.raises(ConfigError, match=rf"{name} exists; .* replace it with --force"):
            run(tmp_path, "out.jsonl")
        assert (tmp_path / name).read_text() == "mine"
        (tmp_path / name).unlink()
    with pytest.raises(ConfigError, match=r"out.json: JSON lines are written; name it \*.jsonl"):
        run(tmp_path, "out.json")


def test_nothing_is_written_where_nothing_passes_or_a_file_is_broken(
    tmp_path: Path, jsonl: Jsonl
) -> None:
    data = jsonl(tmp_path / "in.jsonl", captions("a", "b", "click here for more cats"))
    with pytest.raises(DataError) as caught:
        run(tmp_path, "out.jsonl", FilterConfig())
    assert str(caught.value) == (
        f"{data}: none of 3 records passes (2 too short, 1 spam); nothing was written"
    )
    with data.open("a") as file:
        file.write("{\n")
    with pytest.raises(ManifestError, match=r"in.jsonl:4: malformed JSON"):
        run(tmp_path, "out.jsonl")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl"]


def test_a_folder_that_cannot_be_written_to(tmp_path: Path, jsonl: Jsonl) -> None:
    jsonl(tmp_path / "in.jsonl", captions("a cat"))
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"file: cannot be written: File exists; .* another --out"):
        run(tmp_path, "file/out.jsonl")


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        (FilterConfig(min_length=-1), "min_length: must be at least 0, got -1"),
        (
            FilterConfig(min_length=9, max_length=8),
            "max_length: must be at least min_length=9 and 1, got 8",
        ),
        (FilterConfig(spam=("a", " ")), "spam: holds an empty text"),
        (FilterConfig(near=0), r"near: must be in (0, 1], got 0"),
        (FilterConfig(tokenizer="/none"), "--tokenizer /none: cannot be loaded: no such folder"),
    ],
)
def test_values_that_cannot_be(
    tmp_path: Path, jsonl: Jsonl, config: FilterConfig, problem: str
) -> None:
    jsonl(tmp_path / "in.jsonl", captions("a cat"))
    with pytest.raises(ConfigError) as caught:
        run(tmp_path, "out.jsonl", config)
    assert str(caught.value) == problem
