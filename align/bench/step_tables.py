"""Result rows of `align bench step` as tables for people."""

from __future__ import annotations

from collections.abc import Sequence

from align.bench.break_even import DECODING, BreakEven, Row
from align.bench.tables import Table

COLUMNS = [
    "loop",
    "samples/s p20",
    "p50",
    "p80",
    "ceiling",
    "MFU",
    "cached over it",
    "by operations",
    "tokens/s",
    "data wait",
    "memory MB",
    "J/sample",
    "batch",
]
RIGHT = tuple(range(1, len(COLUMNS)))


def cases(rows: Sequence[Row]) -> dict[tuple[str, int], dict[str, dict[str, Row]]]:
    """{(LLM, visual tokens): {loop: {metric: row}}}, in the rows' order."""
    found: dict[tuple[str, int], dict[str, dict[str, Row]]] = {}
    for row in rows:
        key = row["config"]["llm"], row["config"]["visual_tokens"]
        found.setdefault(key, {}).setdefault(row["provider"], {})[row["metric"]] = row
    return found


def tables(rows: Sequence[Row]) -> list[Table]:
    """One of each language model and number of visual tokens."""
    found = []
    for (llm, tokens), by_loop in cases(rows).items():
        config = by_loop["cached"]["rate"]["config"]
        matmul = by_loop["matmul"]["rate"]["p50"]
        lines = []
        for name in (name for name in by_loop if "MFU" in by_loop[name]):
            of = by_loop[name]
            rate, over = of["rate"], by_loop["cached"].get(f"over {name}")
            joules = of.get("energy")
            lines.append(
                [
                    name,
                    *(figure(rate[part]) for part in ("p20", "p50", "p80")),
                    figure(rate["ceiling"]),
                    f"{of['MFU']['p50']:.2f}",
                    f"{over['p50']:.2f}" if over else "",
                    f"{over['ceiling']:.2f}" if over else "",
                    f"{of['throughput']['p50']:,.0f}",
                    f"{of['data wait']['p50']:.1%}",
                    f"{of['peak memory']['p50']:,.0f}",
                    figure(joules["p50"]) if joules else "",
                    str(rate["config"]["batch"]),
                ]
            )
        title = (
            f"{llm}, {tokens} visual + {config['text_tokens']:.0f} text tokens, "
            f"{config['connector']}, {config['precision']} on {config['device']}: "
            f"{matmul:.4g} TFLOP/s in products"
        )
        found.append(Table(title, COLUMNS, lines))
    return found


def break_even_tables(measured: Sequence[BreakEven], planned: Sequence[BreakEven]) -> list[Table]:
    """Those that there is something for."""
    found = []
    if measured:
        lines = [
            [each.llm, str(each.visual_tokens), each.against, f"{each.gain:.2f}", epochs(each)]
            for each in measured
        ]
        columns = ["LLM", "visual tokens", "against", "gain", "break-even, epochs"]
        found.append(Table("Break-even by the measured rates", columns, lines))
    if planned:
        by_llm: dict[tuple[str, int], dict[str, BreakEven]] = {}
        for each in planned:
            by_llm.setdefault((each.llm, each.visual_tokens), {})[each.against] = each
        lines = [
            [llm, str(tokens), *(f"{of[d].gain:.2f}x {epochs(of[d])}" for d in DECODING)]
            for (llm, tokens), of in by_llm.items()
        ]
        columns = ["LLM", "visual tokens", *(f"decoding {each}" for each in DECODING)]
        title = "Gain of an epoch, and epochs until break-even, by `align plan`'s arithmetic"
        found.append(Table(title, columns, lines))
    return found


def epochs(each: BreakEven) -> str:
    """Of a table."""
    return "never" if each.epochs is None else f"{each.epochs:.2f}"


def figure(value: float) -> str:
    """Three digits or more."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
