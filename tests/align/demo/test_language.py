"""Statements about scenes, and the descriptions the tiny language model is trained on."""

import numpy as np

from align.demo.language import (
    ANY,
    PROMPTS,
    code,
    decode,
    hard_negative,
    partial_statement,
    statement_text,
    truth,
)
from align.demo.language_model import describe
from align.demo.shapes import Scene, SceneObject, held_out, parse, sample_scenes

SCENE = Scene(
    SceneObject("small", "red", "circle"), "left of", SceneObject("large", "blue", "square")
)


def test_codes_and_scenes_are_inverse():
    for scene in sample_scenes(200, np.random.default_rng(0)):
        assert decode(code(scene)) == scene


def test_truth_by_hand():
    statements = np.array(
        [
            code(SCENE),
            [ANY, 0, ANY, ANY, ANY, ANY, ANY],  # a red thing
            [1, ANY, ANY, ANY, ANY, ANY, ANY],  # a large thing: the second object
            [1, 0, ANY, ANY, ANY, ANY, ANY],  # a large red thing: no object is both
            [ANY, ANY, ANY, 0, ANY, 4, ANY],  # a thing left of a blue thing
            [ANY, ANY, ANY, 1, ANY, 4, ANY],  # a thing above a blue thing
        ]
    )
    assert truth(np.array([code(SCENE)]), statements).tolist() == [
        [True, True, True, False, True, False]
    ]


def test_partial_statements_are_true_and_hard_negatives_false():
    rng = np.random.default_rng(2)
    for scene in sample_scenes(300, rng):
        own = np.array([code(scene)])
        other = hard_negative(scene, rng)
        assert truth(own, np.array([partial_statement(scene, rng)])).all()
        assert not truth(own, np.array([code(other)])).any()
        assert not held_out(other)


def test_a_whole_statement_reads_as_a_caption():
    rng = np.random.default_rng(3)
    for scene in sample_scenes(100, rng):
        assert parse(statement_text(code(scene), rng)) == scene


def test_descriptions_fill_their_slots_and_never_ask_for_a_held_out_scene():
    rng = np.random.default_rng(4)
    for num_slots in (8, 16, 24):
        for scene in sample_scenes(300, rng):
            example = describe(scene, num_slots, rng)
            told = parse(example.caption)
            assert len(example.bundles) == num_slots
            assert told is not None
            assert not held_out(told)


def test_prompts_begin_a_new_line():
    assert all(prompt.startswith("\n") for prompt in PROMPTS)
