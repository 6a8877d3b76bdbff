"""From measured rates to epochs: when the extraction of features has been earned back.

*measured*: of the language models that were measured, by their own rates. *planned*: of every
Qwen3, by the arithmetic of align/plan.py with the shares of the device's products that were
reached; its disk is the one that `align plan` assumes.

A run of connector ablations is an epoch each, so epochs are also runs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from align.flop import LANGUAGE_MODELS
from align.plan import Machine, Plan, Workload, connector_of
from featcache.registry import ENCODERS

Row = dict[str, Any]
PLANNED_LLMS = ("qwen3-0.6b", "qwen3-1.7b", "qwen3-4b", "qwen3-8b", "qwen3-14b")
PLANNED_TOKENS = (64, 144, 729)
PLANNED_IMAGES = 558_128
"""LLaVA's stage 1. Break-even in epochs hardly depends on it."""
DECODING = ("free", "as here", "bottleneck")
"""Of images: in no time; by this machine's cores at the measured rate; half as fast as the encoder
encodes, as where large photos meet few cores."""


@dataclass(frozen=True, slots=True)
class BreakEven:
    """gain: samples/s of cached training over live (or plain) training. epochs: until what all
    epochs have saved is what the extraction took; None where nothing is saved. against: "live" or
    "plain" where measured, one of `DECODING` where planned."""

    llm: str
    visual_tokens: int
    against: str
    gain: float
    epochs: float | None


def measured(rows: Sequence[Row]) -> list[BreakEven]:
    """Of each language model and number of tokens among the rows; empty where no row tells the
    encoder's rate."""
    encode = next((row["p50"] for row in rows if row["metric"] == "encode"), None)
    if encode is None:
        return []
    rates: dict[tuple[str, int], dict[str, float]] = {}
    for row in rows:
        if row["metric"] == "rate" and row["provider"] != "matmul":
            key = row["config"]["llm"], row["config"]["visual_tokens"]
            rates.setdefault(key, {})[row["provider"]] = row["p50"]
    found = []
    for (llm, tokens), of in rates.items():
        for name in sorted(set(of) - {"cached"}):
            saved_s = 1 / of[name] - 1 / of["cached"]
            epochs = 1 / encode / saved_s if saved_s > 0 else None
            found.append(BreakEven(llm, tokens, name, of["cached"] / of[name], epochs))
    return found


def machine_of(rows: Sequence[Row]) -> Machine | None:
    """What was measured, as `align plan` takes it; None where the encoder or decoding was not.

    The training's share of the device's products is that of the largest model measured.
    """
    by_metric = {(row["provider"], row["metric"]): row for row in rows}
    try:
        encode, decode = by_metric["live", "encode"], by_metric["live", "decode"]
    except KeyError:
        return None
    of_llm = max(
        (row for row in rows if (row["provider"], row["metric"]) == ("cached", "operations")),
        key=lambda row: row["p50"],
    )["config"]
    [utilised] = [
        row["p50"]
        for row in rows
        if (row["provider"], row["metric"]) == ("cached", "MFU") and row["config"] == of_llm
    ]
    return Machine(
        gpu_tflops=by_metric["matmul", "rate"]["p50"],
        encode_efficiency=encode["p50"] / encode["ceiling"],
        train_efficiency=utilised,
        cores=decode["config"]["cores"],
        decode_images_per_s=decode["p50"],
    )


def planned(rows: Sequence[Row]) -> list[BreakEven]:
    """Of every Qwen3, number of tokens and way of decoding; empty as `machine_of` is None."""
    machine = machine_of(rows)
    if machine is None:
        return []
    config = rows[0]["config"]
    encoder = ENCODERS[config["model"]]
    found = []
    for llm in PLANNED_LLMS:
        for tokens in PLANNED_TOKENS:
            workload = Workload(
                encoder=encoder,
                llm=LANGUAGE_MODELS[llm],
                images=PLANNED_IMAGES,
                connector=connector_of(tokens, encoder.num_patches),
                text_tokens=round(config["text_tokens"]),
                supervised_tokens=round(config["supervised_tokens"]),
            )
            encodes = 1 / machine.encode_s(workload.encode_flop)
            free = replace(machine, decode_images_per_s=math.inf)
            bound = replace(machine, cores=1, decode_images_per_s=encodes / 2)
            for decoding, of in zip(DECODING, (free, machine, bound), strict=True):
                plan = Plan(workload, of)
                found.append(
                    BreakEven(
                        workload.llm.name, tokens, decoding, plan.gain, plan.break_even_epochs
                    )
                )
    return found
