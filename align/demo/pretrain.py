"""Make the two tiny checkpoints that ship with this repository, from nothing and without a network.

    python -m align.demo.pretrain [--out DIR] [--steps N] [--seed N]

The encoder (SigLIP) sees pictures and captions, the language model (Qwen3) sees text only, and
neither sees a held-out scene. They train side by side in two processes of one thread each, so
that the result does not depend on how many cores there are; the same seed on the same machine and
library versions gives the same files. docs/demo.md says what was measured.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

from align.demo.encoder import hard_retrieval, probe, save_encoder, train_encoder
from align.demo.language import corpus
from align.demo.language_model import copy_accuracy, save_language_model, train_language_model
from align.demo.tokenizer import save_tokenizer, train_tokenizer

VOCAB_SIZE = 512
ENCODER_STEPS = 2600
LANGUAGE_MODEL_STEPS = 2000
_REPOSITORY = Path(__file__).parents[2]


def pretrain_encoder(
    out: Path, steps: int, seed: int, log: Callable[[str], None]
) -> dict[str, float]:
    """Train the tiny SigLIP, write it and its tokenizer to `out`, and return what was measured on
    held-out scenes: the share of captions preferred to a hard negative, and the probe's accuracies.
    """
    torch.set_num_threads(1)
    tokenizer = train_tokenizer(corpus(seed), VOCAB_SIZE)
    model = train_encoder(tokenizer, VOCAB_SIZE, steps, seed, log)
    save_encoder(model, out)
    save_tokenizer(tokenizer, out)
    return {"retrieval": hard_retrieval(model, tokenizer, seed), **probe(model, seed)}


def pretrain_language_model(
    out: Path, steps: int, seed: int, log: Callable[[str], None]
) -> dict[str, float]:
    """Train the tiny Qwen3, write it and its tokenizer to `out`, and return the share of held-out
    descriptions it turns into the right caption, without noise and with noise of a word's size.
    """
    torch.set_num_threads(1)
    tokenizer = train_tokenizer(corpus(seed), VOCAB_SIZE)
    model = train_language_model(tokenizer, VOCAB_SIZE, steps, seed, log)
    save_language_model(model, out)
    save_tokenizer(tokenizer, out)
    return {
        "copy": copy_accuracy(model, tokenizer, seed, noise=0.0),
        "copy_noise_1": copy_accuracy(model, tokenizer, seed, noise=1.0),
    }


class _Stamped:
    """Prints a line and the seconds since the start; a class, so that a process can be sent it."""

    def __init__(self) -> None:
        self.start = time.time()

    def __call__(self, line: str) -> None:
        print(f"{time.time() - self.start:7.1f} s  {line}", file=sys.stderr, flush=True)


def main() -> None:
    """The command line of this script."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--out",
        type=Path,
        help="write DIR/siglip-tiny and DIR/qwen3-tiny (default: the packages' own assets)",
    )
    parser.add_argument("--steps", type=int, help="of both trainings, for a quick try")
    parser.add_argument("--encoder-steps", type=int, default=ENCODER_STEPS)
    parser.add_argument("--llm-steps", type=int, default=LANGUAGE_MODEL_STEPS)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    encoder_out = (args.out or _REPOSITORY / "featcache" / "assets") / "siglip-tiny"
    llm_out = (args.out or _REPOSITORY / "align" / "assets") / "qwen3-tiny"
    log = _Stamped()
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        jobs = {
            encoder_out: pool.submit(
                pretrain_encoder, encoder_out, args.steps or args.encoder_steps, args.seed, log
            ),
            llm_out: pool.submit(
                pretrain_language_model, llm_out, args.steps or args.llm_steps, args.seed, log
            ),
        }
        for out, job in jobs.items():
            figures = ", ".join(f"{name} {value:.3f}" for name, value in job.result().items())
            log(f"{out}: {figures}")


if __name__ == "__main__":
    main()
