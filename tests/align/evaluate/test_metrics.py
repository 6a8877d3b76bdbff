"""Scores with values worked out by hand."""

from __future__ import annotations

import pytest

from align.metrics import Figure, score_caption, summarise, word_f1

RED = "a small red circle left of a large blue square"
GREEN = "a large green star above a large blue square"


@pytest.mark.parametrize(
    ("reference", "generated", "value"),
    [
        ("a dog", "a dog", 1.0),
        ("A dog.", "a  dog", 1.0),
        ("a dog", "a cat", 0.5),
        ("a dog", "a a", 0.5),  # the second "a" has no partner
        ("a red dog", "dog", 0.5),  # precision 1, recall 1/3
        ("a dog", "", 0.0),
        ("", "", 1.0),
    ],
)
def test_word_f1(reference: str, generated: str, value: float) -> None:
    assert word_f1(reference, generated) == pytest.approx(value)


def test_exact_match_normalises_white_space_only() -> None:
    assert score_caption(None, "a dog", " a\n dog ") == {"exact_match": 1.0, "word_f1": 1.0}
    assert score_caption(None, "a dog", "A dog")["exact_match"] == 0.0


def test_shapes_records_have_attributes() -> None:
    said = "a small red circle above a large blue star"
    assert score_caption("shapes", RED, said) == {
        "exact_match": 0.0,
        "word_f1": pytest.approx(2 * 7 / 19),  # 7 words in common, of 10 and of 9
        "size": 1.0,
        "colour": 1.0,
        "shape": 0.5,
        "relation": 0.0,
        "attributes": 0.625,
    }
    assert "size" not in score_caption("other", RED, said)


def test_means_and_chance() -> None:
    references = [RED, RED, GREEN]
    scores = [score_caption("shapes", text, RED) for text in references]
    figures = summarise(scores, ["shapes"] * 3, references)
    # Two of the three pairs of references that two draws can make have one RED and one GREEN.
    assert figures["exact_match"] == Figure(pytest.approx(2 / 3), 3, pytest.approx(1 / 3))
    assert figures["relation"] == Figure(pytest.approx(2 / 3), 3, pytest.approx(1 / 3))
    assert figures["word_f1"].chance is None


def test_no_chance_level_where_other_records_are_mixed_in() -> None:
    references = [RED, GREEN, "a dog"]
    sources = ["shapes", "shapes", None]
    scores = [score_caption(s, text, text) for s, text in zip(sources, references, strict=True)]
    figures = summarise(scores, sources, references)
    assert figures["exact_match"] == Figure(1.0, 3, None)
    assert figures["size"].n == 2 and figures["size"].chance is not None
