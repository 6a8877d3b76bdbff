"""Train the tiny SigLIP: image-text contrast with the sigmoid loss, on the shapes set.

The texts of a step are the full captions of the scenes, captions that differ from them in one
attribute, and statements that leave attributes open ("a red thing above a square"); each pair
of an image and a text is labelled by whether the text is true of the scene.

Shape letters: B scenes, S statements, L text length in tokens, P patches, D encoder width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from transformers import SiglipConfig, SiglipImageProcessor, SiglipModel

from align.demo.language import (
    code,
    hard_negative,
    object_statements,
    partial_statement,
    statement_text,
    truth,
)
from align.demo.shapes import IMAGE_SIZE, Scene, place, render, sample_scenes
from align.demo.tokenizer import END_OF_TEXT

PATCH_SIZE = 8
WIDTH = 96
LEARNING_RATE = 1.5e-3
MUON_RATE = 8e-3
BATCH_SCENES = 64
_TEXT_LENGTH = 11
_EVAL_SCENES = 512


def build_encoder(vocab_size: int, seed: int) -> SiglipModel:
    """A SigLIP of 4 vision and 2 text layers, with the published initial scale and bias."""
    torch.manual_seed(seed)
    config = SiglipConfig(
        vision_config={
            "hidden_size": WIDTH,
            "intermediate_size": 4 * WIDTH,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "image_size": IMAGE_SIZE,
            "patch_size": PATCH_SIZE,
        },
        text_config={
            "vocab_size": vocab_size,
            "hidden_size": WIDTH,
            "intermediate_size": 2 * WIDTH,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": _TEXT_LENGTH,
            "projection_size": WIDTH,
            "pad_token_id": 0,
            "bos_token_id": 0,
            "eos_token_id": 0,
        },
    )
    config._attn_implementation = "sdpa"
    model = SiglipModel(config)
    with torch.no_grad():
        # With Hugging Face's zeros every pair starts as a coin toss and the many negatives drown
        # the few positives; the paper's values start near the prior "false".
        model.logit_scale.fill_(math.log(10))
        model.logit_bias.fill_(-10)
        embeddings = model.vision_model.embeddings
        embeddings.position_embedding.weight.copy_(_grid_waves())
        weight, bias = _whitening(np.random.default_rng([seed, 0]))
        embeddings.patch_embedding.weight.copy_(weight)
        embeddings.patch_embedding.bias.copy_(bias)
    return model


def _whitening(rng: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Initial patch embedding, weight float[D, 3, 8, 8] and bias float[D]: the D strongest
    principal components of training patches, at equal strength. With random filters the light of
    the background drowns the outlines that tell shapes apart.
    """
    pixels = pixels_of([render(scene, rng) for scene in sample_scenes(512, rng)])
    patches = F.unfold(pixels, PATCH_SIZE, stride=PATCH_SIZE).transpose(1, 2).flatten(0, 1)
    patches = patches.double()
    mean = patches.mean(0)
    covariance = (patches - mean).T @ (patches - mean) / len(patches)
    strength, direction = torch.linalg.eigh(covariance)
    # The constant keeps the pixel noise, which is most of the weak components, from being blown up.
    weight = (direction[:, -WIDTH:] / (strength[-WIDTH:] + 0.02).sqrt()).T * 0.5
    shaped = weight.reshape(WIDTH, 3, PATCH_SIZE, PATCH_SIZE)
    return shaped.float(), (-weight @ mean).float()


def _grid_waves() -> torch.Tensor:
    """float[P, D]: sines and cosines of row and column, wavelengths 3 to 32 patches. Initial
    positions only; from random ones, that two patches are neighbours has to be learned first.
    """
    side = IMAGE_SIZE // PATCH_SIZE
    wavelength = torch.logspace(math.log10(3), math.log10(32), WIDTH // 4)
    angle = torch.arange(side)[:, None] * 2 * math.pi / wavelength
    axis = torch.cat([angle.sin(), angle.cos()], dim=1)
    rows = axis[:, None].expand(side, side, -1)
    columns = axis[None].expand(side, side, -1)
    return torch.cat([rows, columns], dim=-1).reshape(side * side, WIDTH) / 2


def train_encoder(
    tokenizer: Tokenizer,
    vocab_size: int,
    steps: int,
    seed: int,
    log: Callable[[str], None],
) -> SiglipModel:
    """Train from nothing for `steps` steps of 64 new images; `log` gets a line at times."""
    model = build_encoder(vocab_size, seed)
    rng = np.random.default_rng([seed, 1])
    # Muon for the matrices of the layers: with AdamW alone this run stays at telling colours.
    # The scale has to triple and the bias to move by several units: ten times the rate lets them
    # get there in a run of some thousand steps.
    affine = [model.logit_scale, model.logit_bias]
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and ".layers." in n]
    taken = {id(p) for p in (*affine, *matrices)}
    others = [p for p in model.parameters() if id(p) not in taken]
    groups: list[dict[str, Any]] = [
        {"params": others},
        {"params": affine, "lr": 10 * LEARNING_RATE},
    ]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.Muon(matrices, lr=MUON_RATE, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(
            groups,
            lr=LEARNING_RATE,
            betas=(0.9, 0.95),
            weight_decay=0.0,
        ),
    ]
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: warmup_cosine(s, steps))
        for optimizer in optimizers
    ]
    model.train()
    for step in range(steps):
        scenes = list(sample_scenes(BATCH_SCENES, rng))
        pixels = pixels_of([render(scene, rng) for scene in scenes])
        statements = _statements(scenes, rng)
        texts = [statement_text(statement, rng) for statement in statements]
        labels = truth(np.array([code(s) for s in scenes]), statements)
        logits = _logits(model, pixels, encode_texts(tokenizer, texts))
        signs = torch.from_numpy(labels).float() * 2 - 1
        loss = -F.logsigmoid(signs * logits).sum() / BATCH_SCENES
        model.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
        if step % 50 == 0 or step == steps - 1:
            log(f"encoder step {step}/{steps} loss {loss.item():.3f}")
    return model.eval()


def warmup_cosine(step: int, steps: int) -> float:
    """Learning-rate factor: 0 -> 1 over the first 5 % of the steps, then a cosine to 0.02."""
    warmup = max(1, steps // 20)
    if step < warmup:
        return (step + 1) / warmup
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def _statements(scenes: list[Scene], rng: np.random.Generator) -> np.ndarray:
    """int[S, 7]: the caption of each scene, a hard negative of each, a partial statement about
    every other one, and all statements about a single object.

    The last are what makes a run this short possible: a caption says everything at once, and
    training on captions alone stays for thousands of steps at telling colours.
    """
    rows = [code(scene) for scene in scenes]
    rows += [code(hard_negative(scene, rng)) for scene in scenes]
    rows += [partial_statement(scene, rng) for scene in scenes[::2]]
    rows += object_statements()
    return np.array(rows)


def _logits(model: SiglipModel, pixels: torch.Tensor, text_ids: torch.Tensor) -> torch.Tensor:
    """float[B, S]: the sigmoid's logit of every pair. (SiglipModel's own forward pads its loss
    to one text an image.)"""
    images = F.normalize(model.vision_model(pixel_values=pixels).pooler_output, dim=-1)
    texts = F.normalize(model.text_model(input_ids=text_ids).pooler_output, dim=-1)
    return images @ texts.T * model.logit_scale.exp() + model.logit_bias


def encode_texts(tokenizer: Tokenizer, texts: list[str]) -> torch.Tensor:
    """int64[S, L] padded to the full length, as SigLIP reads its texts from the last position."""
    pad = tokenizer.token_to_id(END_OF_TEXT)
    rows = [encoding.ids for encoding in tokenizer.encode_batch(texts)]
    return torch.tensor([row + [pad] * (_TEXT_LENGTH - len(row)) for row in rows])


def pixels_of(images: list[np.ndarray]) -> torch.Tensor:
    """float32[B, 3, 64, 64] in -1..1 from uint8[64, 64, 3] images, as the saved processor gives."""
    stacked = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
    return stacked.float().div(127.5).sub(1).contiguous()


def save_encoder(model: SiglipModel, out: Path) -> None:
    """Write config.json, model.safetensors and preprocessor_config.json for plain transformers."""
    model.save_pretrained(out)
    SiglipImageProcessor(
        size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        resample=3,
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
    ).save_pretrained(out)


@torch.inference_mode()
def hard_retrieval(
    model: SiglipModel, tokenizer: Tokenizer, seed: int, count: int = _EVAL_SCENES
) -> float:
    """Share of `count` held-out scenes whose caption beats its hard negative."""
    rng = np.random.default_rng([seed, 2])
    scenes = list(sample_scenes(count, rng, held_out_only=True))
    right = [code(scene) for scene in scenes]
    wrong = [code(hard_negative(scene, rng)) for scene in scenes]
    texts = [statement_text(c, rng) for c in right + wrong]
    pixels = pixels_of([render(scene, rng) for scene in scenes])
    logits = _logits(model, pixels, encode_texts(tokenizer, texts))
    own, other = logits.diagonal(), logits.diagonal(offset=count)
    return (own > other).float().mean().item()


@torch.inference_mode()
def probe(model: SiglipModel, seed: int, layer: int = -2) -> dict[str, float]:
    """What a linear map reads from the patch under an object's centre and from the mean of the
    3 x 3 patches there, at `hidden_states[layer]`: accuracy of size, colour, shape, relation and
    order (whether the object is the one that the caption names first), on held-out scenes.

    Ridge regression on one-hot targets, fitted on 2,000 training scenes.
    """
    features, targets = {}, {}
    for split, count in (("train", 2000), ("val", _EVAL_SCENES)):
        rng = np.random.default_rng([seed, 3 if split == "train" else 4])
        images, centres, codes = [], [], []
        for scene in sample_scenes(count, rng, held_out_only=split == "val"):
            picture_seed = int(rng.integers(2**31))
            images.append(render(scene, np.random.default_rng(picture_seed)))
            centres.append(place(scene, np.random.default_rng(picture_seed)))
            codes.append(code(scene))
        hidden = model.vision_model(
            pixel_values=pixels_of(images), output_hidden_states=True
        ).hidden_states[layer]
        xy = torch.tensor(centres)  # [B, 2 objects, (x, y)]
        picked = torch.cat([_around(hidden, xy, (0,)), _around(hidden, xy, (-1, 0, 1))], dim=-1)
        flat = picked.flatten(0, 1).double()
        features[split] = torch.cat([flat, torch.ones(len(flat), 1)], dim=1)
        table = torch.tensor(codes)
        order = torch.tensor([0, 1]).expand(len(table), 2)[..., None]
        relation = table[:, 3:4].expand(len(table), 2)[..., None]
        own = torch.stack([table[:, :3], table[:, 4:]], dim=1)
        targets[split] = torch.cat([own, relation, order], dim=2).flatten(0, 1)
    x = features["train"]
    gram = x.T @ x + 1e-2 * torch.eye(x.shape[1], dtype=torch.float64)
    result = {}
    for index, name in enumerate(("size", "colour", "shape", "relation", "order")):
        one_hot = F.one_hot(targets["train"][:, index]).double()
        weights = torch.linalg.solve(gram, x.T @ one_hot)
        guess = (features["val"] @ weights).argmax(1)
        result[name] = (guess == targets["val"][:, index]).double().mean().item()
    return result


def _around(hidden: torch.Tensor, xy: torch.Tensor, offsets: tuple[int, ...]) -> torch.Tensor:
    """float[B, 2, D]: the mean of the patches at `offsets` in both directions from the ones that
    hold the points xy float[B, 2, (x, y)], in pixels. hidden: float[B, P, D].
    """
    side = IMAGE_SIZE // PATCH_SIZE
    cell = (xy / PATCH_SIZE).long()
    total = torch.zeros(*xy.shape[:2], hidden.shape[-1])
    for dy in offsets:
        for dx in offsets:
            column = (cell[..., 0] + dx).clamp(0, side - 1)
            row = (cell[..., 1] + dy).clamp(0, side - 1)
            patch = (row * side + column)[..., None].expand(-1, -1, hidden.shape[-1])
            total += hidden.gather(1, patch)
    return total / len(offsets) ** 2
