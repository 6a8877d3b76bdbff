"""Tiny twins of the shipped recipes: the recipe itself with widths, batch and number of steps made
small. What it learns with, template, mask, layout, optimizer and data rules, stays as shipped."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

from align.config import RunConfig, list_configs, load_config
from align.connectors.sva import SvaConfig
from featcache.extract import ExtractOptions, extract
from tests.support_models import save_clip, save_llama
from tests.support_tokenizers import llama2, llama3

RECIPES = sorted(set(list_configs()) - {"demo"})
"""The demo has its own test."""


def write_parts(world: Path, folder: Path) -> Path:
    """clip/, vicuna/, llama3/ beside the world's siglip/ and qwen3/; returns `folder`."""
    save_clip(folder / "clip", width=40)
    save_llama(folder / "vicuna", llama2(), num_key_value_heads=2)
    save_llama(folder / "llama3", llama3(), num_key_value_heads=2)
    for name in ("siglip", "qwen3"):
        shutil.copytree(world / name, folder / name)
    return folder


def twin(name: str, world: Path, parts: Path) -> tuple[RunConfig, list[Path]]:
    """The recipe made small, and the stores that it is trained on, made where they are not there.

    world: of the fixture's name. parts: see `write_parts`.
    """
    config = load_config(name)
    fit = "pad" if config.layout.unpad or config.connector.name == "sva" else "checkpoint"
    encoders = ["siglip"]
    llm = config.llm.name
    folder = "qwen3" if "Qwen" in llm else "llama3" if "Llama-3" in llm else "vicuna"
    small: dict[str, object] = {}
    if config.connector.name == "resampler":
        small = {"num_latents": 4, "heads": 2, "head_dim": 16}
    elif isinstance(config.connector, SvaConfig):
        encoders = ["siglip", "clip", "siglip"]
        small = {"width": 32, "side": 4, "heads": 4, "token_lengths": [16, 16, 64]}
    elif name.startswith("llava15"):
        encoders = ["clip"]
    token = config.llm.image_token
    if folder == "vicuna" and config.template.name == "chatml_direct":
        folder, token = "qwen3", "<|image_pad|>"  # Yi has ChatML's tokens, as Qwen does
    made_small = replace(
        config,
        llm=replace(config.llm, name=str(parts / folder), image_token=token),
        features=replace(config.features, encoders=[], layers=["-2"] * len(encoders)),
        data=replace(config.data, eval_ratio=0.2, max_samples=None),
        connector=replace(config.connector, **small),  # type: ignore[type-var]
        train=replace(
            config.train, steps=4, batch_size=3, grad_accum=2, save_every=2, log_every=1,
            eval_every=4, sample_every=0, device="cpu", keep_best=False,
        ),
        eval=replace(config.eval, max_new_tokens=4, temperature=0.0),
    )  # fmt: skip
    return made_small, [_store(world, parts, encoder, fit) for encoder in encoders]


def _store(world: Path, parts: Path, encoder: str, fit: str) -> Path:
    """Of the world's images by one of the encoders, fitted in one of the ways."""
    out = parts / f"{encoder}-{fit}.zarr"
    if not out.exists():
        extract(
            ExtractOptions(
                model=str(parts / encoder), data=(world / "captions.jsonl",),
                image_root=world / "images", out=out, fit=fit,
            )
        )  # fmt: skip
    return out
