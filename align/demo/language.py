"""The words of the shapes set: statements that are true or false of a scene, and the corpus that
the tokenizer is trained on.

Shape letters: B scenes, S statements.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import numpy as np

from align.demo.shapes import (
    COLOURS,
    INVERSE,
    RELATIONS,
    SHAPES,
    SIZES,
    Scene,
    SceneObject,
    caption,
    held_out,
    sample_scenes,
)

# What stands between image and caption in the template `caption`; the first is its default.
PROMPTS = (
    "\nDescribe the image in one sentence.\n",
    "\nDescribe the image in one sentence.",
    "\nDescribe the image.\n",
    "\nWhat is in the image?\n",
    "\n",
)
# Words that say nothing about a scene; the language model learns to pass over them.
FILLERS = (
    "the", "picture", "shows", "and", "with", "background", "there", "is", "image", "one", "in",
    "of", "on", "grey", "texture", "object", "thing", "here", "some", ",", ".", "stripes",
)  # fmt: skip
FIRST_TAGS = ("first", "left", "top")
SECOND_TAGS = ("second", "right", "bottom")
ANY = -1  # a place in a code that a statement leaves open
_VALUES = (SIZES, COLOURS, SHAPES, RELATIONS, SIZES, COLOURS, SHAPES)


def code(scene: Scene) -> list[int]:
    """The scene as seven indices: size, colour, shape, relation, size, colour, shape."""
    first, second = scene.first, scene.second
    words = [first.size, first.colour, first.shape, scene.relation]
    words += [second.size, second.colour, second.shape]
    return [values.index(word) for values, word in zip(_VALUES, words, strict=True)]


def decode(codes: Sequence[int]) -> Scene:
    """The scene of seven indices; the inverse of `code`."""
    w = [values[index] for values, index in zip(_VALUES, codes, strict=True)]
    return Scene(SceneObject(w[0], w[1], w[2]), w[3], SceneObject(w[4], w[5], w[6]))


def hard_negative(scene: Scene, rng: np.random.Generator) -> Scene:
    """Another scene that differs in one attribute, or has its two objects exchanged; never a
    held-out one, lest those captions be known as always false.
    """
    while True:
        codes = code(scene)
        place = int(rng.integers(8))
        if place == 7:
            codes = [*codes[4:], codes[3], *codes[:3]]
        else:
            count = len(_VALUES[place])
            codes[place] = (codes[place] + int(rng.integers(1, count))) % count
        other = decode(codes)
        alike = (other.first.colour, other.first.shape) == (
            other.second.colour,
            other.second.shape,
        )
        if not alike and not held_out(other) and other != scene:
            return other


def object_statements() -> list[list[int]]:
    """All 125 statements about one object, from "a small thing" to "a large purple star": codes
    with ANY in the last four places.
    """
    choices = itertools.product(*((ANY, *range(len(values))) for values in _VALUES[:3]))
    return [[*choice, ANY, ANY, ANY, ANY] for choice in choices if any(c != ANY for c in choice)]


def partial_statement(scene: Scene, rng: np.random.Generator) -> list[int]:
    """A true statement about both objects of `scene` that leaves attributes open, as a code with
    ANY in places; the relation is always told.
    """
    codes = code(scene)
    opened = rng.random(7) < 0.4
    opened[3] = False
    return [ANY if o else c for o, c in zip(opened, codes, strict=True)]


def statement_text(codes: Sequence[int], rng: np.random.Generator) -> str:
    """A statement in words, e.g. "a red thing above a large square"; half of those with a
    relation are turned round ("a large square below a red thing").
    """
    first = _phrase(codes[:3])
    if codes[3] == ANY:
        return first
    relation, second = RELATIONS[codes[3]], _phrase(codes[4:])
    if rng.random() < 0.5:
        inverse = next(name for name, turned in INVERSE.items() if turned == relation)
        return f"{second} {inverse} {first}"
    return f"{first} {relation} {second}"


def _phrase(codes: Sequence[int]) -> str:
    size, colour, shape = codes
    words = ["a"]
    words += [SIZES[size]] if size != ANY else []
    words += [COLOURS[colour]] if colour != ANY else []
    words += [SHAPES[shape] if shape != ANY else "thing"]
    return " ".join(words)


def truth(scenes: np.ndarray, statements: np.ndarray) -> np.ndarray:
    """bool[B, S]: whether each statement (int[S, 7], ANY where open) holds of each scene
    (int[B, 7]). A statement about one object holds when either object fits.
    """
    agree = (scenes[:, None] == statements[None]) | (statements[None] == ANY)
    whole = agree.all(axis=2)
    single = statements[:, 3] == ANY
    second = (scenes[:, None, 4:] == statements[None, :, :3]) | (statements[None, :, :3] == ANY)
    return whole | (single[None] & second.all(axis=2))


def corpus(seed: int) -> Iterator[str]:
    """Text for the tokenizer: captions, statements, prompts and fillers, each word often enough
    to become one token with its leading space.
    """
    rng = np.random.default_rng(seed)
    for scene in sample_scenes(2000, rng):
        yield caption(scene)
        yield " " + caption(scene)
        yield statement_text(_any_statement(scene, rng), rng)
    for _ in range(200):
        yield from PROMPTS
        yield "\nDescribe each image in order, one sentence per image."
        yield "system\nYou are a helpful assistant.\nuser\nassistant\n"
        yield "Image 1: Image 2:"
        yield " " + " ".join(FIRST_TAGS + SECOND_TAGS + FILLERS)


def _any_statement(scene: Scene, rng: np.random.Generator) -> list[int]:
    """A true statement about one object of `scene` (3 in 5) or about both."""
    if rng.random() < 0.6:
        codes = code(scene)
        kept = codes[:3] if rng.random() < 0.5 else codes[4:]
        named = rng.permutation(3)[: rng.integers(1, 4)]
        return [kept[i] if i in named else ANY for i in range(3)] + [ANY] * 4
    return partial_statement(scene, rng)
