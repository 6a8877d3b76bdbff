"""The page of a real run: what is on it, escaped, and nothing fetched from elsewhere."""

from __future__ import annotations

import base64
import io
import json
import re
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from align.errors import RunError
from align.evaluate import evaluate
from align.report import Word, compare_words, write_report
from align.run import Run
from featcache.errors import ConfigError


class Page(HTMLParser):
    """Tags and attributes as a browser would see them, and that all are closed in order."""

    VOID = ("meta", "img", "br", "path", "use", "rect")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_page_of_an_evaluated_run(run: Run) -> None:
    own = evaluate(run)
    evaluate(run, shuffle_features=True)
    path = write_report(run.path)
    assert path == run.path / "report.html"
    text = path.read_text()
    page = Page(text)
    for caption in own.captions:  # 16 samples: all of them are shown, as best or as worst
        words = " ".join(caption.reference.split())
        assert words in re.sub(r"\s+", " ", page.text)
    images = [attrs["src"] or "" for tag, attrs in page.tags if tag == "img"]
    assert len(images) == 16 + 8  # the evaluated ones, and the sample captions while training
    kind, data = images[0].split(",")
    assert kind == "data:image/png;base64"
    assert Image.open(io.BytesIO(base64.b64decode(data))).size[1] == 40
    assert sum(tag == "svg" for tag, _ in page.tags) == 2
    assert "var(--accent)" in text and "#0102" not in text
    for fact in ("Shuffled", "Store fingerprint", "connector", "16 of 16 samples"):
        assert fact in page.text


def test_a_control_that_was_evaluated_otherwise_is_not_beside_it(run: Run) -> None:
    evaluate(run)
    evaluate(run, shuffle_features=True)
    page = Page(write_report(run.path).read_text())
    assert page.text.count("from another image's features") == 16
    assert "is not shown" not in page.text
    evaluate(run, shuffle_features=True, limit=9)
    page = Page(write_report(run.path).read_text())
    assert "evaluated otherwise (n: 16 -> 9)" in page.text
    assert "from another image's features" not in page.text
    hot = replace(run.config.eval, temperature=0.5, batch_size=3)
    evaluate(run, shuffle_features=True, decoding=hot)
    page = Page(write_report(run.path).read_text())
    assert "evaluated otherwise (decoding.temperature: 0.0 -> 0.5)" in page.text


def test_records_of_one_id_keep_their_own_control(run: Run) -> None:
    evaluate(run)
    evaluate(run, shuffle_features=True)
    for name in ("val", "val-shuffled"):
        captions = run.path / "eval" / name / "captions.jsonl"
        rows = [json.loads(line) for line in captions.read_text().splitlines()]
        rows = [{**r, "id": "same", "generated": f"{name} {i}"} for i, r in enumerate(rows)]
        captions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = Page(write_report(run.path).read_text()).text
    assert all(f"val-shuffled {i}" in text for i in range(16))


def test_page_fetches_nothing_and_runs_nothing(run: Run) -> None:
    evaluate(run)
    page = Page(write_report(run.path).read_text())
    assert not [tag for tag, _ in page.tags if tag in ("script", "link", "iframe", "base")]
    for tag, attrs in page.tags:
        for name in ("src", "href", "xlink:href", "srcset", "action"):
            value = attrs.get(name) or ""
            assert value.startswith(("data:", "#")) or not value, (tag, name, value)
        assert not [name for name in attrs if name.startswith("on")]


def test_everything_is_escaped(run: Run) -> None:
    evaluate(run)
    captions = run.path / "eval" / "val" / "captions.jsonl"
    evil = "<script>alert(1)</script> & <img src=x onerror=alert(2)>"
    rows = [json.loads(line) for line in captions.read_text().splitlines()]
    rows = [{**row, "generated": evil, "reference": evil + " ]]>", "id": evil} for row in rows]
    captions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    info = run.folder.read_info()
    info["samples"]["left_out"] = {evil: 3}
    info["stores"][0]["encoder"]["name"] = evil
    run.folder.write_info(info)
    page = Page(write_report(run.path).read_text())
    assert "alert(1)" in page.text
    assert not [tag for tag, _ in page.tags if tag == "script"]
    assert all((attrs["src"] or "").startswith("data:") for tag, attrs in page.tags if tag == "img")


def test_the_same_run_gives_the_same_page(run: Run) -> None:
    evaluate(run)
    first = write_report(run.path).read_bytes()
    assert write_report(run.path).read_bytes() == first


def test_run_without_evaluation_and_without_image_files(run: Run) -> None:
    config = run.folder.config
    config.write_text(re.sub(r"(?m)^  images: .*", "  images: /nowhere", config.read_text()))
    page = Page(write_report(run.path).read_text())
    assert "Not evaluated yet" in page.text
    assert "image file not found" in page.text


def marked(words: list[Word]) -> str:
    return " ".join(f"[{word.text}]" if word.odd else word.text for word in words)


@pytest.mark.parametrize(
    ("reference", "generated", "in_reference", "in_generated"),
    [
        ("a dog", "a dog", "a dog", "a dog"),
        ("a dog", "", "[a] [dog]", ""),
        ("", "a dog", "", "[a] [dog]"),
        ("a red circle", "a blue circle x", "a [red] circle", "a [blue] circle [x]"),
        # Word by word in their places, not the longest run in common.
        (
            "a small green square above a large red star",
            "a large red star above a small green star",
            "a [small] [green] [square] above a [large] [red] star",
            "a [large] [red] [star] above a [small] [green] star",
        ),
    ],
)
def test_wrong_words_are_marked(
    reference: str, generated: str, in_reference: str, in_generated: str
) -> None:
    truth, said = compare_words(reference, generated)
    assert (marked(truth), marked(said)) == (in_reference, in_generated)


def test_no_run(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="not a run's folder"):
        write_report(tmp_path)


@pytest.mark.parametrize("module", ["jinja2", "matplotlib"])
def test_missing_extra_is_one_line(run: Run, module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError) as caught:
        write_report(run.path)
    assert str(caught.value) == f"the report needs {module}: pip install 'featcache[report]'"
