"""Train the tiny Qwen3 on text alone: scene descriptions in words -> caption.

It sees no image and no image feature. A description stands where an image would: a block of Q
vectors in front of the prompt, made of the model's own word embeddings. So that it can later
follow vectors that are no words, the descriptions vary (word order, repeats, fillers, several
words added up in one vector, words missing) and the vectors are scaled and noised.

Shape letters: B batch samples, Q description vectors, W words added up in one vector, T sequence
length, H width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from transformers import Qwen3Config, Qwen3ForCausalLM

from align.demo.encoder import warmup_cosine
from align.demo.language import FILLERS, FIRST_TAGS, PROMPTS, SECOND_TAGS, code, decode
from align.demo.shapes import (
    COLOURS,
    RELATIONS,
    SHAPES,
    SIZES,
    Scene,
    caption,
    held_out,
    sample_scenes,
)
from align.demo.tokenizer import END_OF_TEXT

WIDTH = 128
LEARNING_RATE = 3e-3
BATCH_SAMPLES = 64
SLOTS = 16
_SLOT_CHOICES = (8, 12, SLOTS, SLOTS, SLOTS, 24, 32)
_MAX_WORDS = 6
_VALUES = (SIZES, COLOURS, SHAPES, RELATIONS, SIZES, COLOURS, SHAPES)

Bundle = list[tuple[str, float]]
"""Words and weights that are added up in one description vector; empty means noise alone."""


@dataclass(frozen=True, slots=True)
class Example:
    """A description as Q bundles, and the caption it should give."""

    bundles: list[Bundle]
    caption: str


def build_language_model(tokenizer: Tokenizer, vocab_size: int, seed: int) -> Qwen3ForCausalLM:
    """A Qwen3 of 4 layers, 4 query and 2 key heads, embeddings tied as in Qwen3-0.6B."""
    torch.manual_seed(seed)
    end = tokenizer.token_to_id(END_OF_TEXT)
    config = Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=WIDTH,
        intermediate_size=3 * WIDTH,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=end,
        pad_token_id=end,
        initializer_range=0.05,
    )
    config._attn_implementation = "sdpa"
    return Qwen3ForCausalLM(config)


def describe(scene: Scene, num_slots: int, rng: np.random.Generator) -> Example:
    """A description of the scene in `num_slots` vectors, in words or in bundles of words."""
    if rng.random() < 0.25:
        return Example(_sentence(scene, num_slots, rng), caption(scene))
    return _bundles(scene, num_slots, rng)


def _sentence(scene: Scene, num_slots: int, rng: np.random.Generator) -> list[Bundle]:
    """One word a vector, in sentence order, over again while there is room, with fillers."""
    first = [scene.first.size, scene.first.colour, scene.first.shape]
    second = [scene.second.size, scene.second.colour, scene.second.shape]
    words: list[str] = []
    while len(words) + 7 <= num_slots:
        a, b = list(rng.permutation(first)), list(rng.permutation(second))
        words += [*a, scene.relation.split()[0], *b]
    room = max(0, num_slots - len(words))
    for _ in range(int(rng.integers(0, room + 1))):
        words.insert(int(rng.integers(len(words) + 1)), str(rng.choice(FILLERS)))
    bundles: list[Bundle] = [[(str(word), 1.0)] for word in words]
    return bundles + [[] for _ in range(num_slots - len(bundles))]


def _bundles(scene: Scene, num_slots: int, rng: np.random.Generator) -> Example:
    """Vectors that each add up some words about one object.

    Which object a vector is about is told by a tag word in it ("first", "right", ...), or by its
    place: the first half of the vectors for the first object.
    """
    shown, weights, told = _blur(scene, rng)
    family = int(rng.integers(3))
    if family > 0:  # left/right and top/bottom say the relation, so they must be true.
        family = 1 if scene.relation == RELATIONS[0] else 2
    tags = (FIRST_TAGS[family], SECOND_TAGS[family])
    by_place = rng.random() < 0.4
    tag_ratio = rng.choice([0.0, 0.5, 1.0]) if by_place else 1.0
    facts_per_vector = int(rng.integers(1, 4))

    half = num_slots // 2
    slots = rng.permutation(num_slots)
    groups = (
        (np.arange(half), np.arange(half, num_slots)) if by_place else (slots[:half], slots[half:])
    )
    bundles: list[Bundle] = [[] for _ in range(num_slots)]
    for which, group in enumerate(groups):
        group = rng.permutation(group)
        if rng.random() < 0.5:  # some vectors say nothing
            group = group[: max(3, int(len(group) * rng.uniform(0.4, 1)))]
        order = rng.permutation(3)
        for index, slot in enumerate(group):
            # Taken in turn, so that every attribute is told before one is repeated.
            for fact in {int(order[(index + k) % 3]) for k in range(facts_per_vector)}:
                place = fact + 4 * which
                for value, weight in zip(shown[place], weights[place], strict=True):
                    if weight > 0:
                        bundles[slot].append((_VALUES[place][value], weight))
            if rng.random() < tag_ratio:
                bundles[slot].append((tags[which], 1.0))
    relation_word = scene.relation.split()[0]
    for slot in rng.permutation(num_slots)[: rng.integers(1, 4)]:
        if len(bundles[slot]) >= _MAX_WORDS:
            continue
        if rng.random() < 0.5 and (family == 0 or rng.random() < 0.5):
            bundles[slot].append((relation_word, 1.0))
        elif family == 0:
            bundles[slot] = [*bundles[slot], (relation_word, 1.0)]
    return Example(bundles, caption(told))


def _blur(
    scene: Scene, rng: np.random.Generator
) -> tuple[list[tuple[int, int]], list[tuple[float, float]], Scene]:
    """Sometimes mix one attribute with a wrong value, and answer the wrong one as often as its
    share says. A model that has learned this leans on a vector by degrees instead of all or
    nothing, which is what gives a connector a slope to follow.

    Returns for each of the seven places two values and their weights, and the scene to answer.
    """
    codes = code(scene)
    shown = [(value, value) for value in codes]
    weights = [(1.0, 0.0) for _ in codes]
    place = int(rng.choice([0, 1, 2, 4, 5, 6]))
    roll = rng.random()
    if roll < 0.08:
        weights[place] = (0.0, 0.0)  # untold: the answer can only be guessed
    elif roll < 0.4:
        count = len(_VALUES[place])
        other = (codes[place] + int(rng.integers(1, count))) % count
        share = rng.uniform(0.5, 1)
        flipped = [*codes]
        flipped[place] = other
        answer = decode(flipped)
        if not held_out(answer):
            shown[place], weights[place] = (codes[place], other), (share, 1 - share)
            if rng.random() < (1 - share) ** 2 / (share**2 + (1 - share) ** 2):
                return shown, weights, answer
    return shown, weights, scene


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """Token ids of the words in descriptions, each a single token with its leading space."""

    ids: dict[str, int]

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> Vocabulary:
        """Raises ValueError where the tokenizer splits one of the words."""
        words = {*SIZES, *COLOURS, *SHAPES, *FIRST_TAGS, *SECOND_TAGS, *FILLERS}
        words |= {relation.split()[0] for relation in RELATIONS}
        ids = {}
        for word in sorted(words):
            spaced = word if word in ".," else f" {word}"
            encoded = tokenizer.encode(spaced).ids
            if len(encoded) != 1:
                raise ValueError(f"the tokenizer splits {spaced!r}; train it on more text")
            ids[word] = encoded[0]
        return cls(ids)


def block(table: torch.Tensor, vocabulary: Vocabulary, examples: Sequence[Example]) -> torch.Tensor:
    """float[B, Q, H]: the clean description vectors, from the embedding table float[V, H]."""
    num_slots = len(examples[0].bundles)
    ids = np.zeros((len(examples), num_slots, _MAX_WORDS), dtype=np.int64)
    weights = np.zeros(ids.shape, dtype=np.float32)
    for b, example in enumerate(examples):
        for q, bundle in enumerate(example.bundles):
            for w, (word, weight) in enumerate(bundle[:_MAX_WORDS]):
                ids[b, q, w], weights[b, q, w] = vocabulary.ids[word], weight
    return (table[torch.from_numpy(ids)] * torch.from_numpy(weights)[..., None]).sum(2)


def roughen(clean: torch.Tensor, scale: float, generator: torch.Generator) -> torch.Tensor:
    """Scale each block by a factor in 0.4..2.5, and add noise whose size is drawn per block, up
    to `scale` (a word embedding's size); float[B, Q, H].
    """
    B = len(clean)
    factor = torch.exp((torch.rand(B, 1, 1, generator=generator) * 2 - 1) * 0.92)
    amount = torch.rand(B, 1, 1, generator=generator) * scale
    return (clean + torch.randn(clean.shape, generator=generator) * amount) * factor


def train_language_model(
    tokenizer: Tokenizer,
    vocab_size: int,
    steps: int,
    seed: int,
    log: Callable[[str], None],
) -> Qwen3ForCausalLM:
    """Train from nothing for `steps` steps of 64 new descriptions; `log` gets a line at times."""
    model = build_language_model(tokenizer, vocab_size, seed)
    vocabulary = Vocabulary.of(tokenizer)
    rng = np.random.default_rng([seed, 11])
    generator = torch.Generator().manual_seed(seed)
    gains = [p for p in model.parameters() if p.ndim < 2]
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.05}, {"params": gains, "weight_decay": 0.0}],
        lr=LEARNING_RATE,
        betas=(0.9, 0.95),
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: warmup_cosine(s, steps))
    model.train()
    for step in range(steps):
        num_slots = int(rng.choice(_SLOT_CHOICES))
        scenes = sample_scenes(BATCH_SAMPLES, rng)
        examples = [describe(scene, num_slots, rng) for scene in scenes]
        prompt = PROMPTS[0] if rng.random() < 0.75 else str(rng.choice(PROMPTS))
        # Noise comes in slowly: from the start it keeps the model from learning to copy at all.
        noise = 1.2 * min(1.0, max(0.0, step / steps - 0.2) / 0.4)
        table = model.get_input_embeddings().weight
        clean = block(table, vocabulary, examples)
        size = table.detach()[list(vocabulary.ids.values())].pow(2).mean().sqrt().item()
        slots = roughen(clean, noise * size, generator)
        loss, _ = caption_loss(model, tokenizer, slots, prompt, [e.caption for e in examples])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0 or step == steps - 1:
            log(f"language model step {step}/{steps} loss {loss.item():.3f}")
    return model.eval()


def caption_loss(
    model: Qwen3ForCausalLM,
    tokenizer: Tokenizer,
    slots: torch.Tensor,
    prompt: str,
    captions: Sequence[str],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean loss over caption and end-of-text tokens behind [slots, prompt], as in the template
    `caption`; and bool[B] whether every one of these tokens is the most likely one.
    """
    end = tokenizer.token_to_id(END_OF_TEXT)
    prompt_ids = tokenizer.encode(prompt).ids
    answers = [[*tokenizer.encode(text).ids, end] for text in captions]
    length = max(len(answer) for answer in answers)
    ids = torch.tensor([prompt_ids + a + [end] * (length - len(a)) for a in answers])
    labels = torch.tensor([a + [-100] * (length - len(a)) for a in answers])
    words = model.get_input_embeddings()(ids)
    hidden = model.model(
        inputs_embeds=torch.cat([slots, words], dim=1), use_cache=False
    ).last_hidden_state
    start = slots.shape[1] + len(prompt_ids) - 1
    logits = model.lm_head(hidden[:, start : start + length])
    loss = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=-100)
    exact = ((logits.argmax(-1) == labels) | (labels == -100)).all(1)
    return loss, exact


@torch.inference_mode()
def copy_accuracy(
    model: Qwen3ForCausalLM, tokenizer: Tokenizer, seed: int, noise: float, count: int = 256
) -> float:
    """Share of held-out scenes whose caption follows exactly from a description of one word a
    vector, with noise of `noise` times a word embedding's size.
    """
    rng = np.random.default_rng([seed, 12])
    vocabulary = Vocabulary.of(tokenizer)
    scenes = list(sample_scenes(count, rng, held_out_only=True))
    examples = [Example(_sentence(s, SLOTS, rng), caption(s)) for s in scenes]
    table = model.get_input_embeddings().weight
    size = table[list(vocabulary.ids.values())].pow(2).mean().sqrt()
    clean = block(table, vocabulary, examples)
    generator = torch.Generator().manual_seed(seed)
    slots = clean + torch.randn(clean.shape, generator=generator) * size * noise
    _, exact = caption_loss(model, tokenizer, slots, PROMPTS[0], [e.caption for e in examples])
    return exact.float().mean().item()


def save_language_model(model: Qwen3ForCausalLM, out: Path) -> None:
    """Write config.json, generation_config.json and model.safetensors."""
    model.save_pretrained(out)
