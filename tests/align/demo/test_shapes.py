"""The captioned-shapes set: one picture has one caption, and held-out scenes stay held out."""

import json

import numpy as np
import pytest
from PIL import Image

from align.demo.shapes import (
    ATTRIBUTES,
    COLOURS,
    IMAGE_SIZE,
    RELATIONS,
    SHAPES,
    SIZES,
    Scene,
    SceneObject,
    caption,
    chance,
    held_out,
    parse,
    place,
    render,
    sample_scenes,
    score,
    write_dataset,
)

SMALL_RED_CIRCLE = SceneObject("small", "red", "circle")
LARGE_BLUE_SQUARE = SceneObject("large", "blue", "square")
CAPTION = "a small red circle left of a large blue square"


def test_the_same_seed_renders_the_same_bytes():
    scene = Scene(SMALL_RED_CIRCLE, "above", LARGE_BLUE_SQUARE)
    first = render(scene, np.random.default_rng(7))
    again = render(scene, np.random.default_rng(7))
    other = render(scene, np.random.default_rng(8))
    assert first.shape == (IMAGE_SIZE, IMAGE_SIZE, 3)
    assert first.dtype == np.uint8
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


@pytest.mark.parametrize("held_out_only", [False, True])
def test_every_scene_survives_caption_and_parse(held_out_only):
    rng = np.random.default_rng(1)
    for scene in sample_scenes(2000, rng, held_out_only=held_out_only):
        assert parse(caption(scene)) == scene
        assert held_out(scene) == held_out_only
        assert (scene.first.colour, scene.first.shape) != (scene.second.colour, scene.second.shape)


def test_a_caption_reads_as_documented():
    assert caption(Scene(SMALL_RED_CIRCLE, "left of", LARGE_BLUE_SQUARE)) == CAPTION


@pytest.mark.parametrize(
    ("text", "relation"),
    [
        ("a large blue square right of a small red circle", "left of"),
        ("A large blue square below a small red circle.", "above"),
        (" a small red circle above a large blue square\n", "above"),
    ],
)
def test_both_ways_to_say_a_relation_are_one_scene(text, relation):
    assert parse(text) == Scene(SMALL_RED_CIRCLE, relation, LARGE_BLUE_SQUARE)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a small red circle",
        "a small red circle near a large blue square",
        "a small pink circle above a large blue square",
        "small red circle above a large blue square",
        "a small red circle above a large blue square and more",
    ],
)
def test_other_text_is_no_scene(text):
    assert parse(text) is None


@pytest.mark.parametrize(
    ("generated", "size", "colour", "shape", "relation"),
    [
        (CAPTION, 1.0, 1.0, 1.0, 1.0),
        ("a large blue square right of a small red circle", 1.0, 1.0, 1.0, 1.0),
        ("a small red circle above a large blue square", 1.0, 1.0, 1.0, 0.0),
        ("a large red circle left of a large blue star", 0.5, 1.0, 0.5, 1.0),
        ("a large blue square left of a small red circle", 0.0, 0.0, 0.0, 1.0),
        ("circle circle circle", 0.0, 0.0, 0.0, 0.0),
    ],
)
def test_score_by_hand(generated, size, colour, shape, relation):
    expected = {"size": size, "colour": colour, "shape": shape, "relation": relation}
    assert score(CAPTION, generated) == expected


def test_score_refuses_a_reference_that_is_no_caption():
    with pytest.raises(ValueError, match="not a caption"):
        score("a dog on a sofa", CAPTION)


def test_chance_is_what_exchanged_captions_score():
    rng = np.random.default_rng(3)
    captions = [caption(scene) for scene in sample_scenes(60, rng, held_out_only=True)]
    pairs = [(a, b) for i, a in enumerate(captions) for j, b in enumerate(captions) if i != j]
    levels = chance(captions)
    for attribute in ATTRIBUTES:
        measured = np.mean([score(a, b)[attribute] for a, b in pairs])
        assert levels[attribute] == pytest.approx(measured)
    assert levels["exact"] == pytest.approx(np.mean([a == b for a, b in pairs]))


def test_chance_needs_two_captions():
    with pytest.raises(ValueError, match="at least two"):
        chance([CAPTION])


def test_the_held_out_rule_ignores_order_size_and_relation():
    share = []
    for colour in COLOURS:
        for shape in SHAPES:
            pair = [SceneObject("small", colour, shape), SMALL_RED_CIRCLE]
            if (colour, shape) == ("red", "circle"):
                continue
            rule = held_out(Scene(pair[0], "above", pair[1]))
            for size in SIZES:
                for relation in RELATIONS:
                    resized = SceneObject(size, colour, shape)
                    assert held_out(Scene(pair[1], relation, resized)) == rule
            share.append(rule)
    assert 0.05 < np.mean(share) < 0.4


def test_place_tells_where_render_puts_the_objects():
    scene = Scene(SMALL_RED_CIRCLE, "left of", SceneObject("large", "green", "square"))
    for seed in range(20):
        picture = render(scene, np.random.default_rng(seed)).astype(int)
        (x1, y1), (x2, y2) = place(scene, np.random.default_rng(seed))
        assert x2 - x1 >= 28
        red, green = picture[int(y1), int(x1)], picture[int(y2), int(x2)]
        assert red.argmax() == 0
        assert green.argmax() == 1


def test_write_dataset_writes_disjoint_caption_jsonl(tmp_path):
    train, val = write_dataset(tmp_path, num_train=30, num_val=10, seed=5)
    records = {
        path.stem: [json.loads(line) for line in path.read_text().splitlines()]
        for path in (train, val)
    }
    assert [len(records["train"]), len(records["val"])] == [30, 10]
    for split, rows in records.items():
        for row in rows:
            scene = parse(row["caption"])
            assert scene is not None
            assert held_out(scene) == (split == "val")
            with Image.open(tmp_path / row["images"][0]) as picture:
                assert (picture.mode, picture.size) == ("RGB", (IMAGE_SIZE, IMAGE_SIZE))
    ids = [row["id"] for rows in records.values() for row in rows]
    assert len(set(ids)) == 40


def test_a_larger_set_begins_with_the_smaller_one(tmp_path):
    write_dataset(tmp_path / "a", num_train=3, num_val=2, seed=5)
    write_dataset(tmp_path / "b", num_train=6, num_val=2, seed=5)
    for file in sorted((tmp_path / "a" / "images").iterdir()):
        assert file.read_bytes() == (tmp_path / "b" / "images" / file.name).read_bytes()
