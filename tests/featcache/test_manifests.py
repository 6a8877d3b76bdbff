from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from featcache.errors import ManifestError
from featcache.manifests import Record, Skipped, Turn, find_data, read_manifest


def written(tmp_path: Path, name: str, content: object) -> Path:
    path = tmp_path / name
    if isinstance(content, str):
        path.write_text(content)
    elif name.endswith(".jsonl"):
        path.write_text("".join(json.dumps(line) + "\n" for line in content))  # type: ignore[attr-defined]
    else:
        path.write_text(json.dumps(content))
    return path


ANSWER = [
    {"from": "human", "value": "<image>\nWhat is it?"},
    {"from": "gpt", "value": "A cat."},
]


def test_llava_json(tmp_path: Path) -> None:
    entries = [
        {"id": "000", "image": "a/1.jpg", "conversations": ANSWER},
        {"id": 7, "image": ["2.jpg", "./3.jpg"], "conversations": ANSWER},
    ]
    manifest = read_manifest([written(tmp_path, "llava.json", entries)])
    turns = (Turn("human", "<image>\nWhat is it?"), Turn("gpt", "A cat."))
    assert manifest.records == [
        Record("000", ("a/1.jpg",), turns, None, "llava.json[0]"),
        Record("7", ("2.jpg", "3.jpg"), turns, None, "llava.json[1]"),
    ]
    assert manifest.image_root == tmp_path
    assert manifest.image_keys() == ["a/1.jpg", "2.jpg", "3.jpg"]


def test_cambrian_jsonl_edge_cases(tmp_path: Path) -> None:
    lines = [
        {"image": "1.jpg", "conversations": [{"from": "gpt", "value": "Hello."}, *ANSWER]},
        *({"image": text, "conversations": ANSWER} for text in ("", "None", "none", "nan")),
        {"conversations": ANSWER, "source": "text"},
        {"image": "1.jpg", "video": "1.mp4", "conversations": ANSWER},
    ]
    manifest = read_manifest([written(tmp_path, "cambrian.jsonl", lines)])
    assert [record.images for record in manifest.records] == [("1.jpg",), (), (), (), (), ()]
    assert manifest.records[0].turns[0].role == "human"
    assert manifest.records[5].source == "text"
    assert manifest.records[5].id == "cambrian.jsonl:6"
    assert [(s.origin, s.reason) for s in manifest.skipped] == [
        ("cambrian.jsonl:7", "has both an image and a video")
    ]


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"video": "1.mp4"}, "has a video"),
        ({"video": ["1.mp4"]}, "has a video"),
        ({"video": "1.mp4", "image": "nan"}, "has a video"),
        ({"video": "1.mp4", "images": ["1.jpg"]}, "has both an image and a video"),
        ({"video": "1.mp4", "image": ["1.jpg"]}, "has both an image and a video"),
    ],
)
def test_any_video_is_reported(tmp_path: Path, fields: dict[str, object], reason: str) -> None:
    """Without an image, too: as a text it would speak of what is not shown."""
    lines = [{**fields, "conversations": ANSWER}, {"image": "ok.png", "caption": "b"}]
    manifest = read_manifest([written(tmp_path, "x.jsonl", lines)])
    assert manifest.skipped == [Skipped("x.jsonl:1", reason)]


@pytest.mark.parametrize("nothing", [None, "", "None", "none", "nan", []])
def test_a_video_field_that_says_none_is_none(tmp_path: Path, nothing: object) -> None:
    lines = [{"image": "1.jpg", "video": nothing, "conversations": ANSWER}]
    assert read_manifest([written(tmp_path, "x.jsonl", lines)]).image_keys() == ["1.jpg"]


def test_tables_have_every_column_in_every_record(tmp_path: Path) -> None:
    """Of a union of sources: null stands for what the record's own source does not have."""
    lines = [
        {"image": "1.jpg", "images": None, "caption": None, "conversations": ANSWER},
        {"image": None, "images": ["2.jpg"], "caption": "b", "conversations": None, "video": None},
        {"image": "3.jpg", "images": [], "caption": "c", "video": []},
    ]
    first, second, third = read_manifest([written(tmp_path, "x.jsonl", lines)]).records
    assert (first.images, first.turns[1].text) == (("1.jpg",), "A cat.")
    assert (second.images, second.turns[1].text) == (("2.jpg",), "b")
    assert (third.images, third.turns[1].text) == (("3.jpg",), "c")


def test_a_list_of_images_may_hold_none(tmp_path: Path) -> None:
    lines = [
        {"image": ["1.jpg", None, ""], "conversations": ANSWER},
        {"image": [], "conversations": ANSWER},
    ]
    records = read_manifest([written(tmp_path, "x.jsonl", lines)]).records
    assert [record.images for record in records] == [("1.jpg",), ()]


def test_a_dropped_answer_may_leave_nothing(tmp_path: Path) -> None:
    lines = [{"image": "1.jpg", "conversations": [{"from": "gpt", "value": "Hello."}]}]
    assert read_manifest([written(tmp_path, "x.jsonl", lines)]).records[0].turns == ()


def test_records_are_counted_by_the_file_that_was_named(tmp_path: Path) -> None:
    one = {"image": "1.jpg", "caption": "a"}
    written(tmp_path, "a.jsonl", [one, {"image": "1.jpg"}, one])
    written(tmp_path, "b1.json", [one])
    written(tmp_path, "b2.json", [one, one])
    files = [tmp_path / "a.jsonl", tmp_path / "b{1,2}.json", tmp_path / "a.jsonl"]
    manifest = read_manifest(files)
    assert manifest.counts == (2, 3, 2)
    assert len(manifest.records) == 7 and len(manifest.skipped) == 2


def test_entries_hold_what_the_file_holds(tmp_path: Path) -> None:
    lines = [{"image": "a/../1.jpg", "caption": " A. ", "width": 1.5}, 3]
    entries = list(find_data([written(tmp_path, "x.jsonl", lines)]).entries())
    assert [entry.element for entry in entries] == lines
    assert isinstance(entries[0].outcome, Record) and entries[0].outcome.images == ("1.jpg",)
    assert entries[1].outcome == Skipped("x.jsonl:2", "not a JSON object but int")


def test_caption_jsonl(tmp_path: Path) -> None:
    lines = [
        {"id": "x", "images": ["1.jpg", "2.jpg"], "caption": " Two. ", "source": "mine"},
        {"id": "y", "images": ["1.jpg"], "caption": "  "},
        {"id": "z", "images": ["1.jpg"], "caption": None},
    ]
    manifest = read_manifest([written(tmp_path, "captions.jsonl", lines)])
    turns = (Turn("human", "<image>\n<image>\n"), Turn("gpt", "Two."))
    assert manifest.records == [Record("x", ("1.jpg", "2.jpg"), turns, "mine", "captions.jsonl:1")]
    assert [s.reason for s in manifest.skipped] == [
        "the caption is empty",
        "the caption is null, not text",
    ]


def test_directory(tmp_path: Path) -> None:
    for name in ("b.JPG", "a/c.png", "a/notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert read_manifest([tmp_path]).image_keys() == ["a/c.png", "b.JPG"]
    assert read_manifest([tmp_path / "a"], tmp_path).image_keys() == ["a/c.png"]


def test_directories_outside_of_the_image_root_are_refused(tmp_path: Path) -> None:
    for name in ("a/1.png", "b/1.png"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).touch()
    both = [tmp_path / "a", tmp_path / "b"]
    with pytest.raises(ManifestError, match=r"lies outside of the image root .* with --images"):
        read_manifest(both)
    assert read_manifest(both, tmp_path).image_keys() == ["a/1.png", "b/1.png"]


def test_symbolic_links_are_followed_once(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real/1.png").touch()
    for name in ("loop", "again"):
        (tmp_path / "real" / name).symlink_to(tmp_path / "real")
    (tmp_path / "data").mkdir()
    (tmp_path / "data/linked").symlink_to(tmp_path / "real")
    assert read_manifest([tmp_path / "data"]).image_keys() == ["linked/1.png"]


@pytest.mark.parametrize("name", ["../secret.png", "a/../../secret.png", "/etc/secret.png"])
def test_paths_that_leave_the_image_root_are_refused(tmp_path: Path, name: str) -> None:
    lines = [{"image": name, "caption": "a"}, {"image": "ok.png", "caption": "b"}]
    manifest = read_manifest([written(tmp_path, "x.jsonl", lines)])
    assert manifest.image_keys() == ["ok.png"]
    assert manifest.skipped[0].reason == f"the image path {name!r} leaves the image root {tmp_path}"


def test_absolute_paths_inside_the_image_root_become_keys(tmp_path: Path) -> None:
    lines = [{"images": [str(tmp_path / "a" / "1.png")], "caption": "a"}]
    assert read_manifest([written(tmp_path, "x.jsonl", lines)]).image_keys() == ["a/1.png"]


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        (["a"], "not a JSON object but list"),
        ({"image": "1.png"}, 'has neither "caption" nor "conversations"'),
        ({"image": 3, "caption": "a"}, "an image path is int, not text: 3"),
        ({"conversations": "hello"}, '"conversations" is not a list'),
        ({"conversations": [{"from": "human"}]}, 'a turn lacks its "value" text'),
        (
            {"conversations": [{"from": "bot", "value": "a"}]},
            'a turn is from \'bot\'; known are "human", "gpt" and "system"',
        ),
    ],
)
def test_unusable_records_are_skipped_with_a_reason(
    tmp_path: Path, entry: object, reason: str
) -> None:
    lines = [entry, {"image": "ok.png", "caption": "b"}]
    assert read_manifest([written(tmp_path, "x.jsonl", lines)]).skipped[0].reason == reason


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.jsonl", '{"a": 1}\n{"a": \n', "x.jsonl:2: malformed JSON: Expecting value at column 6"),
        ("x.json", '[{"a": 1},\n {"b" 2}]', "x.json:2: malformed JSON: Expecting ':' delimiter"),
        ("x.jsonl", "", "x.jsonl: no usable records"),
        ("x.json", "[]", "x.json: no usable records"),
        ("x.json", "[3]", "no usable records; the first was skipped: not a JSON object but int"),
    ],
)
def test_bad_files_name_file_and_line(
    tmp_path: Path, name: str, content: str, message: str
) -> None:
    with pytest.raises(ManifestError) as caught:
        read_manifest([written(tmp_path, name, content)])
    assert message in str(caught.value)


@pytest.mark.parametrize("line", ['{"n": ' + "9" * 5000 + "}", "[" * 100_000], ids=["int", "deep"])
def test_json_that_python_refuses_names_its_line(tmp_path: Path, line: str) -> None:
    with pytest.raises(ManifestError, match=r"x\.jsonl:1: unreadable JSON"):
        read_manifest([written(tmp_path, "x.jsonl", line)])


def test_text_that_is_no_unicode_is_skipped(tmp_path: Path) -> None:
    lines = [
        {"image": "\ud800.png", "caption": "a"},
        {"image": "1.png", "caption": "half \udc00"},
        {"id": "\ud800", "image": "2.png", "caption": "a"},
        {"image": "ok.png", "caption": "b"},
    ]
    manifest = read_manifest([written(tmp_path, "x.jsonl", lines)])
    assert manifest.image_keys() == ["ok.png"]
    assert [s.reason for s in manifest.skipped] == [
        "the image path '\\ud800.png' holds a character that is no text",
        "its text holds half a surrogate pair",
        "its id holds half a surrogate pair",
    ]


def test_a_byte_order_mark_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_bytes(b'\xef\xbb\xbf[{"image": "1.png", "caption": "a"}]')
    assert read_manifest([tmp_path / "x.json"]).image_keys() == ["1.png"]


def test_missing_and_binary_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jsonl")
    with pytest.raises(ManifestError, match="is neither a file nor a directory"):
        read_manifest([tmp_path / "pipe.jsonl"])
    with pytest.raises(ManifestError, match=r"none\.json does not exist; check --data"):
        read_manifest([tmp_path / "none.json"])
    (tmp_path / "x.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ManifestError, match="is not UTF-8 text"):
        read_manifest([tmp_path / "x.json"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ManifestError, match="holds no image files"):
        read_manifest([tmp_path / "empty"])
