"""Scores of one generated caption, and their means over a split.

A metric maps (reference, generated) to figures in 0..1, one or more by name; a record belongs to it
or not. Adding one = one function and one line in `METRICS`.

- `exact_match`: 1 where the captions are equal once white space is normalised (runs of white space
  become one space, ends are stripped). Case and punctuation count.
- `word_f1`: harmonic mean of precision and recall over the bag of lower-cased words, punctuation
  stripped from their ends (Rajpurkar et al. 2016, SQuAD, without the dropping of articles). It
  ranks captions where an exact match is rare.
- `size`, `colour`, `shape`, `relation`, and `attributes`, the mean of the four: records of the
  demo's shapes set only (`align.demo.shapes.score`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from align.demo import shapes


@dataclass(frozen=True, slots=True)
class Figure:
    """A mean over samples.

    value: in the metric's own unit. n: the samples it is the mean of.
    chance: what captions that ignore the image score, where that is known.
    """

    value: float
    n: int
    chance: float | None = None


@dataclass(frozen=True, slots=True)
class Metric:
    """score: (reference, generated) -> figures. applies: to a record's source.
    chance: references -> the same figures for captions that ignore the image; None: not known.
    """

    score: Callable[[str, str], dict[str, float]]
    applies: Callable[[str | None], bool]
    chance: Callable[[Sequence[str]], dict[str, float]] | None = None


def normalised(text: str) -> str:
    """`text` with runs of white space as one space, and none at its ends."""
    return " ".join(text.split())


def exact_match(reference: str, generated: str) -> float:
    return float(normalised(reference) == normalised(generated))


def word_f1(reference: str, generated: str) -> float:
    truth, said = _words(reference), _words(generated)
    common = sum((Counter(truth) & Counter(said)).values())
    if not common:
        return float(not truth and not said)
    return 2 * common / (len(truth) + len(said))


def _words(text: str) -> list[str]:
    stripped = (word.strip(".,;:!?\"'()") for word in text.lower().split())
    return [word for word in stripped if word]


def _words_scores(reference: str, generated: str) -> dict[str, float]:
    return {
        "exact_match": exact_match(reference, generated),
        "word_f1": word_f1(reference, generated),
    }


def _shapes_scores(reference: str, generated: str) -> dict[str, float]:
    return _with_mean(shapes.score(reference, generated))


def _shapes_chance(references: Sequence[str]) -> dict[str, float]:
    levels = shapes.chance(references)
    exact = levels.pop("exact")
    return {"exact_match": exact, **_with_mean(levels)}


def _with_mean(attributes: dict[str, float]) -> dict[str, float]:
    return {**attributes, "attributes": sum(attributes.values()) / len(attributes)}


METRICS: dict[str, Metric] = {
    "words": Metric(_words_scores, lambda source: True),
    "shapes": Metric(_shapes_scores, lambda source: source == "shapes", _shapes_chance),
}


def score_caption(source: str | None, reference: str, generated: str) -> dict[str, float]:
    """Every figure that a record of `source` has, by name.

    Raises ValueError where `source` is "shapes" and the reference is no caption of that set.
    """
    scores: dict[str, float] = {}
    for metric in METRICS.values():
        if metric.applies(source):
            scores |= metric.score(reference, generated)
    return scores


def summarise(
    scores: Sequence[Mapping[str, float]],
    sources: Sequence[str | None],
    references: Sequence[str],
) -> dict[str, Figure]:
    """The mean of every figure over the samples that have it.

    scores, sources, references: one each a sample. Chance levels are stated where at least two
    samples have the metric *and* all samples of the figure belong to it.
    """
    names = dict.fromkeys(name for row in scores for name in row)
    levels: dict[str, tuple[float, int]] = {}
    for metric in METRICS.values():
        own = [
            text for text, source in zip(references, sources, strict=True) if metric.applies(source)
        ]
        if metric.chance is not None and len(own) >= 2:
            levels |= {name: (level, len(own)) for name, level in metric.chance(own).items()}
    figures = {}
    for name in names:
        values = [row[name] for row in scores if name in row]
        level, of = levels.get(name, (0.0, 0))
        figures[name] = Figure(
            value=sum(values) / len(values),
            n=len(values),
            chance=level if of == len(values) else None,
        )
    return figures
