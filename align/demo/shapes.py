"""A procedural captioned-shapes set: two objects on a textured background, one caption a picture.

A scene is two objects (size, colour, shape) and the relation of the first to the second. The
caption names the leftmost object first, or, where the two stand above each other, the topmost:
"a small red circle left of a large blue square". "B right of A" describes the same picture as
"A left of B"; `parse` reads both and returns the same `Scene`.

Held-out rule: one in five unordered pairs of (colour, shape) is never used for training, in any
order, size or relation, so a caption learned by heart cannot be right on a held-out scene.

Everything is drawn in numpy from a seeded `Generator`: the same seed gives the same bytes.
"""

from __future__ import annotations

import json
import math
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

IMAGE_SIZE = 64
SIZES = ("small", "large")
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple")
SHAPES = ("circle", "square", "triangle", "cross", "star")
RELATIONS = ("left of", "above")
INVERSE = {"right of": "left of", "below": "above"}
ATTRIBUTES = ("size", "colour", "shape", "relation")

# Mid-range RGB in 0..255, apart enough that a jitter of +-18 a channel never mixes two names.
_RGB = {
    "red": (215, 30, 35),
    "orange": (245, 135, 20),
    "yellow": (245, 225, 50),
    "green": (40, 165, 60),
    "blue": (40, 80, 220),
    "purple": (150, 45, 185),
}
_RADIUS_PIXELS = {"small": (7.5, 8.5), "large": (12.0, 13.2)}
_HELD_OUT_MODULUS = 5


@dataclass(frozen=True, slots=True)
class SceneObject:
    """One object: a word from SIZES, one from COLOURS, one from SHAPES."""

    size: str
    colour: str
    shape: str

    @property
    def phrase(self) -> str:
        """The object in words, e.g. "a small red circle"."""
        return f"a {self.size} {self.colour} {self.shape}"


@dataclass(frozen=True, slots=True)
class Scene:
    """Two objects in caption order; `relation` (one of RELATIONS) holds of first to second."""

    first: SceneObject
    relation: str
    second: SceneObject


def caption(scene: Scene) -> str:
    """The one caption of a scene, e.g. "a small red circle left of a large blue square"."""
    return f"{scene.first.phrase} {scene.relation} {scene.second.phrase}"


def parse(text: str) -> Scene | None:
    """The scene that a caption describes, or None where `text` is not a caption.

    Case, surrounding space and a final full stop do not matter; "right of" and "below" are
    turned round into "left of" and "above".
    """
    words = text.strip().rstrip(".").lower().split()
    for relation in (*RELATIONS, *INVERSE):
        middle = relation.split()
        if len(words) != 8 + len(middle) or words[4 : 4 + len(middle)] != middle:
            continue
        first, second = _parse_object(words[:4]), _parse_object(words[-4:])
        if first is None or second is None:
            return None
        if relation in INVERSE:
            return Scene(second, INVERSE[relation], first)
        return Scene(first, relation, second)
    return None


def _parse_object(words: Sequence[str]) -> SceneObject | None:
    article, size, colour, shape = words
    if article != "a" or size not in SIZES or colour not in COLOURS or shape not in SHAPES:
        return None
    return SceneObject(size, colour, shape)


def score(reference: str, generated: str) -> dict[str, float]:
    """Share of each of ATTRIBUTES that `generated` has right: size, colour and shape count both
    objects (0, 0.5 or 1), relation counts once. Text that is not a caption scores 0.

    Raises ValueError when the reference itself is no caption of this set.
    """
    truth = parse(reference)
    if truth is None:
        raise ValueError(f"not a caption of the shapes set: {reference!r}")
    told = parse(generated)
    if told is None:
        return dict.fromkeys(ATTRIBUTES, 0.0)
    return {
        attribute: sum(a == b for a, b in zip(true, said, strict=True)) / len(true)
        for attribute, true, said in zip(
            ATTRIBUTES, _attributes(truth), _attributes(told), strict=True
        )
    }


def _attributes(scene: Scene) -> tuple[tuple[str, ...], ...]:
    first, second = scene.first, scene.second
    return (
        (first.size, second.size),
        (first.colour, second.colour),
        (first.shape, second.shape),
        (scene.relation,),
    )


def chance(references: Sequence[str]) -> dict[str, float]:
    """What captions that ignore the image score: the expected `score`, and the expected "exact"
    match, when every caption is exchanged for another one of `references`. Needs two or more.

    Exact, by counting: two different draws agree in a value v with probability
    sum_v c_v (c_v - 1) / (n (n - 1)).
    """
    scenes = [parse(reference) for reference in references]
    if len(scenes) < 2 or any(scene is None for scene in scenes):
        raise ValueError("chance needs at least two captions of the shapes set")
    rows = [_attributes(scene) for scene in scenes if scene is not None]
    levels = {}
    for index, attribute in enumerate(ATTRIBUTES):
        columns = list(zip(*(row[index] for row in rows), strict=True))
        levels[attribute] = sum(_agreement(column) for column in columns) / len(columns)
    levels["exact"] = _agreement([caption(scene) for scene in scenes if scene is not None])
    return levels


def _agreement(values: Sequence[str]) -> float:
    n = len(values)
    return sum(c * (c - 1) for c in Counter(values).values()) / (n * (n - 1))


def held_out(scene: Scene) -> bool:
    """True where the scene is kept from all training (encoder, language model and connector)."""
    pair = sorted(f"{o.colour} {o.shape}" for o in (scene.first, scene.second))
    return zlib.crc32("|".join(pair).encode()) % _HELD_OUT_MODULUS == 0


def sample_scenes(
    count: int, rng: np.random.Generator, *, held_out_only: bool = False
) -> Iterator[Scene]:
    """`count` scenes with uniform attributes, all held out or all not; the two objects of a scene
    always differ in colour or shape.
    """
    while count > 0:
        first, second = _sample_object(rng), _sample_object(rng)
        scene = Scene(first, RELATIONS[rng.integers(len(RELATIONS))], second)
        if (first.colour, first.shape) == (second.colour, second.shape):
            continue
        if held_out(scene) == held_out_only:
            count -= 1
            yield scene


def _sample_object(rng: np.random.Generator) -> SceneObject:
    return SceneObject(
        SIZES[rng.integers(len(SIZES))],
        COLOURS[rng.integers(len(COLOURS))],
        SHAPES[rng.integers(len(SHAPES))],
    )


def render(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    """The scene as uint8[64, 64, 3] (rows, columns, RGB), with place, size, hue, tilt, light and
    background drawn from `rng`.
    """
    centres = place(scene, rng)
    canvas = _background(rng)
    for scene_object, (x, y) in zip((scene.first, scene.second), centres, strict=True):
        _draw(canvas, scene_object, x, y, rng)
    canvas += rng.normal(0, 4, size=canvas.shape)
    return np.clip(canvas, 0, 255).astype(np.uint8)


def place(scene: Scene, rng: np.random.Generator) -> tuple[tuple[float, float], ...]:
    """Centres (x, y) in pixels of the first and the second object: the first thing that `render`
    draws from its generator, so an equally seeded one tells where the objects of a picture are.
    """
    # The gap along the relation is 28..37 pixels and the offset across it at most 10, so the
    # relation is never in doubt and two large objects touch at most.
    along = (rng.uniform(13.5, 18), rng.uniform(46, 50.5))
    across = np.clip(rng.uniform(18, 46) + rng.uniform(-5, 5, size=2), 14, 50).tolist()
    if scene.relation == "left of":
        return ((along[0], across[0]), (along[1], across[1]))
    return ((across[0], along[0]), (across[1], along[1]))


_ROWS, _COLUMNS = np.mgrid[0:IMAGE_SIZE, 0:IMAGE_SIZE].astype(np.float64) + 0.5


def _background(rng: np.random.Generator) -> np.ndarray:
    """A greyish float64[64, 64, 3]: smooth noise, stripes or checks of low contrast."""
    light = rng.uniform(50, 205)
    base = np.clip(light + rng.uniform(-14, 14, size=3), 0, 255)
    contrast = rng.uniform(5, 16)
    kind = rng.integers(3)
    if kind == 0:
        texture = _smooth_noise(rng)
    else:
        angle, period = rng.uniform(0, math.pi), rng.uniform(5, 16)
        phase = rng.uniform(0, 2 * math.pi, size=2)
        u = np.cos(angle) * _COLUMNS + np.sin(angle) * _ROWS
        texture = np.sin(2 * math.pi * u / period + phase[0])
        if kind == 2:
            v = np.cos(angle) * _ROWS - np.sin(angle) * _COLUMNS
            texture = texture * np.sin(2 * math.pi * v / period + phase[1])
    tint = contrast * rng.uniform(0.7, 1.3, size=3)
    return base + texture[..., None] * tint


def _smooth_noise(rng: np.random.Generator) -> np.ndarray:
    """float64[64, 64] in about -1..1: a coarse random grid, interpolated bilinearly."""
    cells = int(rng.integers(4, 9))
    grid = rng.uniform(-1, 1, size=(cells + 1, cells + 1))
    position = (np.arange(IMAGE_SIZE) + 0.5) * cells / IMAGE_SIZE
    low = position.astype(int)
    weight = position - low
    rows = grid[low] * (1 - weight)[:, None] + grid[low + 1] * weight[:, None]
    return rows[:, low] * (1 - weight) + rows[:, low + 1] * weight


def _draw(
    canvas: np.ndarray, scene_object: SceneObject, x: float, y: float, rng: np.random.Generator
) -> None:
    """Blend one object, centred at (x, y) pixels, into the canvas, with edges one pixel soft."""
    radius = rng.uniform(*_RADIUS_PIXELS[scene_object.size])
    tilt = rng.uniform(-0.15, 0.15)
    dx, dy = _COLUMNS - x, _ROWS - y
    u = np.cos(tilt) * dx + np.sin(tilt) * dy
    v = np.cos(tilt) * dy - np.sin(tilt) * dx
    coverage = np.clip(0.5 - _distance(scene_object.shape, u, v, radius), 0, 1)[..., None]
    colour = np.array(_RGB[scene_object.colour]) + rng.uniform(-18, 18, size=3)
    canvas += coverage * (colour - canvas)


def _distance(shape: str, u: np.ndarray, v: np.ndarray, radius: float) -> np.ndarray:
    """Signed distance to the outline in pixels (negative inside), v pointing down. The shapes
    are scaled to look equally large, so that the radius alone tells small from large.
    """
    if shape == "circle":
        return np.hypot(u, v) - radius
    if shape == "square":
        return np.maximum(np.abs(u), np.abs(v)) - 0.88 * radius
    if shape == "triangle":
        slanted = math.sqrt(3) / 2 * np.abs(u) - v / 2
        return np.maximum(slanted, v) - 0.6 * radius
    if shape == "cross":
        arm, half_width = 1.05 * radius, 0.36 * radius
        a, b = np.abs(u), np.abs(v)
        upright = np.maximum(a - half_width, b - arm)
        level = np.maximum(a - arm, b - half_width)
        return np.minimum(upright, level)
    # A five-pointed star: fold the plane into one half-point, then take the distance to the edge
    # from the tip (outer, 0) to the notch between two points (inner, 36 degrees).
    outer, inner = 1.2 * radius, 0.5 * radius
    fifth = 2 * math.pi / 5
    angle = np.arctan2(u, -v)
    folded = np.abs((angle + fifth / 2) % fifth - fifth / 2)
    length = np.hypot(u, v)
    px, py = length * np.cos(folded), length * np.sin(folded)
    ex, ey = inner * math.cos(fifth / 2) - outer, inner * math.sin(fifth / 2)
    return ((px - outer) * -ey + py * ex) * -1 / math.hypot(ex, ey)


def write_dataset(out: Path, num_train: int, num_val: int, seed: int) -> tuple[Path, Path]:
    """Write `images/*.png` and the caption-JSONL files `train.jsonl` and `val.jsonl` under `out`;
    returns the paths of the two files. `val` holds held-out scenes only, `train` none of them.

    Each record is {"id", "images": [key relative to `out`], "caption", "source": "shapes"}.
    Every image has its own generator, seeded by (seed, split, index), so its bytes do not depend
    on how many images are written.
    """
    (out / "images").mkdir(parents=True, exist_ok=True)
    paths = []
    for split_index, (split, count) in enumerate((("train", num_train), ("val", num_val))):
        scenes = sample_scenes(
            count, np.random.default_rng([seed, split_index]), held_out_only=split == "val"
        )
        lines = []
        for index, scene in enumerate(scenes):
            rng = np.random.default_rng([seed, split_index, index])
            name = f"{split}-{index:06d}"
            key = f"images/{name}.png"
            # compress_level 1: these are temporary, and noise compresses badly at any level.
            Image.fromarray(render(scene, rng)).save(out / key, compress_level=1)
            lines.append(
                json.dumps(
                    {"id": name, "images": [key], "caption": caption(scene), "source": "shapes"}
                )
            )
        path = out / f"{split}.jsonl"
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        paths.append(path)
    return paths[0], paths[1]
