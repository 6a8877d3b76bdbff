"""Language models with random weights, as folders that `llm.name` takes: as slow as the real ones,
and of no other use.

They are written to a disk and loaded from there like any other, so that whatever a run's settings
do to a language model (precision, attention kernel, ...) is done to these too.
"""

from __future__ import annotations

import shutil
from dataclasses import asdict
from pathlib import Path

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from align.errors import ModelError
from align.flop import LANGUAGE_MODELS, LanguageModel, find_language_model
from align.llm import find_llm
from featcache.errors import ConfigError
from featcache.quiet import quiet

MID = LanguageModel("mid", 512, 10, 8, 4, 64, 1536, 32_000)
"""48 M parameters: the largest with which a step on a CPU core takes well under a second."""
TIED_UP_TO = 2560
"""H of the largest Qwen3 whose output layer is its embedding table (4B)."""
SEED = 0


def sizes_of(name: str, random_weights: bool) -> LanguageModel:
    """What `--llm NAME` is to be measured with. "mid" is there with random weights only.

    Raises ModelError where the name is not known, or where its weights would have to be found and
    nothing says where.
    """
    if name == MID.name:
        return MID
    if random_weights and name != "tiny":
        known = LANGUAGE_MODELS.get(name.rsplit("/", 1)[-1].lower())
        return known or find_language_model(name)
    if name.lower() in LANGUAGE_MODELS and not Path(name).is_dir():
        raise ModelError(
            f"--llm {name}: give --random-weights to measure an architecture of that size, or the "
            "folder or hub id (owner/name) of its weights"
        )
    return find_language_model(name)


def is_random(name: str, random_weights: bool) -> bool:
    """Whether `write` has to make it: "tiny" and folders have weights of their own."""
    return name == MID.name or (random_weights and name != "tiny" and not Path(name).is_dir())


def write(folder: Path, sizes: LanguageModel, device: torch.device, dtype: torch.dtype) -> None:
    """A Qwen3 of these sizes with seeded random weights, and the shipped tokenizer.

    device: that the weights are drawn on: 8 B of them take seconds on a GPU. dtype: of the weights.

    Raises ConfigError where the disk has no room.
    """
    tied = sizes.hidden_size <= TIED_UP_TO
    table = sizes.vocab_size * sizes.hidden_size
    nbytes = dtype.itemsize * (sizes.block_parameters + table * (1 if tied else 2))
    free = shutil.disk_usage(folder.parent).free
    if nbytes * 1.05 > free:
        raise ConfigError(
            f"--llm {sizes.name}: its weights take {nbytes / 1e9:.1f} GB and {folder.parent} has "
            f"{free / 1e9:.1f} GB free; give another --dir"
        )
    # transformers names them as we do, but for the layers and heads.
    named = asdict(sizes) | {
        "num_hidden_layers": sizes.num_layers,
        "num_attention_heads": sizes.num_heads,
        "num_key_value_heads": sizes.num_kv_heads,
    }
    for ours in ("name", "num_layers", "num_heads", "num_kv_heads"):
        del named[ours]
    config = Qwen3Config(
        **named, tie_word_embeddings=tied, max_position_embeddings=4096, rope_theta=1e6
    )
    with quiet(), torch.device(device), torch.random.fork_rng(_cuda(device)):
        torch.manual_seed(SEED)
        model = Qwen3ForCausalLM._from_config(config, dtype=dtype)
        model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(find_llm("tiny")) / name, folder / name)


def _cuda(device: torch.device) -> list[torch.device]:
    return [device] if device.type == "cuda" else []
