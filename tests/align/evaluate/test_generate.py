"""Generation in batches: each row says what it says alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from align.config import EvalConfig
from align.data.templates import TemplateConfig
from align.data.tokens import SampleEncoder
from align.generate import _choose, generate
from align.run import Run
from featcache.errors import ConfigError
from featcache.manifests import Record, Turn

GREEDY = EvalConfig(max_new_tokens=12)


def prompts(run: Run) -> tuple[list[Record], Tensor, list[int]]:
    """Records with one to three images, so that prompts differ in length; their features; and how
    many images each has."""
    keys = [sample.record.images[0] for sample in run.splits.train[:12]]
    counts = [1, 3, 2, 1, 2, 3]
    records, start = [], 0
    for number, count in enumerate(counts):
        images = tuple(keys[start : start + count])
        records.append(Record(f"r{number}", images, (Turn("human", ""),), None, ""))
        start += count
    with run.store.reader() as reader:
        features = reader.read(run.store.rows(keys))
    return records, features, counts


def say(
    run: Run,
    records: Sequence[Record],
    features: Tensor,
    config: EvalConfig,
    encoder: SampleEncoder | None = None,
) -> list[str]:
    sizes = [(1, 1)] * len(features)
    return generate(run.model, encoder or run.encoder, records, [features], sizes, config)


def alone(
    run: Run, records: Sequence[Record], features: Tensor, counts: list[int], config: EvalConfig
) -> list[str]:
    parts = features.split(counts)
    return [
        say(run, [record], part, config)[0] for record, part in zip(records, parts, strict=True)
    ]


@pytest.mark.parametrize(
    "config", [GREEDY, replace(GREEDY, temperature=0.7), replace(GREEDY, temperature=1.5, seed=3)]
)
def test_a_batch_of_different_prompt_lengths_equals_one_by_one(
    run: Run, config: EvalConfig
) -> None:
    records, features, counts = prompts(run)
    lengths = {len(run.encoder.encode_prompt(record, [4] * 3).input_ids) for record in records}
    assert len(lengths) == 3
    said = say(run, records, features, config)
    assert said == alone(run, records, features, counts, config)
    assert len(set(said)) > 1  # the images matter, so rows that were mixed up would show


def greedy_ids(run: Run, record: Record, features: Tensor) -> list[int]:
    """The most likely tokens, from the model run anew and without a cache at every step."""
    prompt = run.encoder.encode_prompt(record, [4])
    ids: list[int] = []
    with torch.inference_mode():
        embeds = run.model.inputs_embeds(
            torch.from_numpy(prompt.input_ids)[None],
            torch.from_numpy(prompt.is_slot)[None],
            [features],
            [(1, 1)],
        )
        while len(ids) < GREEDY.max_new_tokens:
            logits = run.model.llm.model(inputs_embeds=embeds, use_cache=False).logits[0, -1]
            ids.append(int(logits.argmax()))
            new = run.model.llm.embedding(torch.tensor([[ids[-1]]]))
            embeds = torch.cat([embeds, new], dim=1)
    return ids


def test_cache_equals_a_forward_pass_over_the_whole_text(run: Run) -> None:
    records, features, _ = prompts(run)
    ids = greedy_ids(run, records[0], features[:1])
    assert not set(ids) & set(run.encoder.stop_ids)
    said = say(run, records[:1], features[:1], GREEDY)
    assert said == [run.tokenizer.decode(ids).strip()]


def test_sampling_depends_on_the_seed_and_the_record_alone(run: Run) -> None:
    records, features, counts = prompts(run)
    hot = replace(GREEDY, temperature=1.0)
    said = say(run, records, features, hot)
    assert said == say(run, records, features, hot)
    assert said != say(run, records, features, replace(hot, seed=1))
    reverse = torch.cat(features.split(counts)[::-1])
    assert said[::-1] == say(run, records[::-1], reverse, hot)


def test_generation_ends_at_the_stop_token(run: Run) -> None:
    records, features, _ = prompts(run)
    ids = greedy_ids(run, records[0], features[:1])
    # The same words, were the third token the one that ends an answer.
    run.tokenizer.eos_token_id = ids[2]
    old = run.encoder
    encoder = SampleEncoder(run.tokenizer, old.template, old.image_token_id, old.max_length)
    said = say(run, records[:1], features[:1], GREEDY, encoder)
    assert said == [run.tokenizer.decode(ids[: ids.index(ids[2])]).strip()]


def test_top_p_keeps_the_fewest_tokens_that_hold_the_share() -> None:
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    config = EvalConfig(temperature=1.0, top_p=0.7)
    uniform = torch.linspace(0, 1 - 1e-6, 10_001)
    chosen = _choose(logits.expand(len(uniform), -1), uniform, config)
    shares = np.bincount(chosen.numpy(), minlength=4) / len(uniform)
    # 0.5 alone is less than 0.7, 0.5 + 0.3 is enough: two tokens, in the ratio 5 to 3.
    np.testing.assert_allclose(shares, [0.625, 0.375, 0, 0], atol=1e-3)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_temperature_scales_the_logits(temperature: float) -> None:
    shares = np.array([0.5, 0.3, 0.2])
    scaled = shares ** (1 / temperature)
    uniform = torch.linspace(0, 1 - 1e-6, 10_001)
    logits = torch.from_numpy(shares).float().log().expand(len(uniform), -1)
    chosen = _choose(logits, uniform, EvalConfig(temperature=temperature, top_p=1.0))
    found = np.bincount(chosen.numpy(), minlength=3) / len(uniform)
    np.testing.assert_allclose(found, scaled / scaled.sum(), atol=1e-3)


@pytest.mark.parametrize("temperature", [1e-45, 1e-30, 1e-5, 1e-3])
def test_tiny_temperatures_take_the_most_likely_token(temperature: float) -> None:
    logits = torch.tensor([[3.0, 40.0, 39.0], [-5.0, -9.0, -80.0]])
    for uniform in (0.0, 0.5, 1 - 1e-6):
        config = EvalConfig(temperature=temperature, top_p=1.0)
        assert _choose(logits, torch.full((2,), uniform), config).tolist() == [1, 0]


@pytest.mark.parametrize("temperature", [float("nan"), -1.0, float("inf")])
def test_temperatures_that_are_none_are_refused(run: Run, temperature: float) -> None:
    records, features, _ = prompts(run)
    config = replace(GREEDY, temperature=temperature)
    with pytest.raises(ConfigError, match=r"eval.temperature: must be at least 0 and finite"):
        say(run, records, features, config)


def test_images_of_later_questions_are_not_in_the_prompt(run: Run) -> None:
    """Of a conversation the first question is answered, with its own images only."""
    keys = [sample.record.images[0] for sample in run.splits.train[:4]]
    turns = (
        Turn("human", "<image>\nWhat is it?"), Turn("gpt", "a"),
        Turn("human", "And <image> or <image>?"), Turn("gpt", "b"),
    )  # fmt: skip
    long = Record("r", tuple(keys[:3]), turns, None, "")
    short = Record("r", (keys[0],), turns[:2], None, "")
    other = Record("o", (keys[3],), turns[:2], None, "")
    chat = SampleEncoder(run.tokenizer, TemplateConfig("qwen"), run.encoder.image_token_id, 500)
    with run.store.reader() as reader:
        features = reader.read(run.store.rows(keys))
    both = say(run, [long, other], features, GREEDY, chat)
    assert both == say(run, [short, other], features[[0, 3]], GREEDY, chat)
    assert both[0] != both[1]
