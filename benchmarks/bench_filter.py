"""`align filter` on half a million captions, beside a pass that only parses and writes the lines.

    python -m benchmarks.bench_filter                     558,128 records, 3 rounds, ten minutes
    python -m benchmarks.bench_filter --records 20000     seconds

Captions are 10 words of 50,000, drawn by Zipf's law, so that most share words with many others.
Each command is a process of its own: seconds hold its start, memory is its VmHWM at the end.
Results: benchmarks/results/filter.jsonl.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from align.bench import results
from align.demo.tokenizer import save_tokenizer, train_tokenizer

WORDS, VOCABULARY, TOKENS = 10, 50_000, 4096

COPY = """
import json, sys
with open(sys.argv[1]) as lines, open(sys.argv[2], "w") as out:
    for line in lines:
        out.write(json.dumps(json.loads(line)) + "\\n")
"""
PROBE = """
import sys
from cli import align
sys.argv = sys.argv[1:]
try:
    align.main()
except SystemExit as stop:
    assert not stop.code, stop.code
finally:
    line = next(x for x in open("/proc/self/status") if x.startswith("VmHWM"))
    print(int(line.split()[1]) * 1024, file=sys.stderr)
"""


def captions(count: int) -> Iterator[str]:
    """Texts of `WORDS` words; a word is as frequent as its number is small."""
    chance = np.random.default_rng(0)
    shares = 1 / np.arange(1, VOCABULARY + 1)
    drawn = chance.choice(VOCABULARY, (count, WORDS), p=shares / shares.sum())
    for words in drawn.tolist():
        yield " ".join(f"word{number}" for number in words)


def write_records(folder: Path, count: int) -> Path:
    """The data file; beside it a tokenizer in tokenizer/."""
    texts = list(captions(count))
    file = folder / "captions.jsonl"
    with file.open("w", encoding="utf-8") as out:
        for number, text in enumerate(texts):
            name = f"{number // 1000:05d}/{number:09d}.jpg"
            out.write(json.dumps({"id": name, "images": [name], "caption": text}) + "\n")
    save_tokenizer(train_tokenizer(texts[:20_000], TOKENS), folder / "tokenizer")
    return file


def run(arguments: list[str]) -> tuple[float, int]:
    """Seconds and the last line of its standard error, a number of bytes, or 0."""
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", *arguments], check=True, capture_output=True, text=True
    )
    seconds = time.perf_counter() - start
    lines = done.stderr.split()
    return seconds, int(lines[-1]) if lines else 0


def measure(folder: Path, records: int, rounds: int) -> list[dict[str, object]]:
    """A row of seconds and one of memory for each command."""
    file = write_records(folder, records)
    out = str(folder / "out.jsonl")
    base = [PROBE, "align", "filter", "--data", str(file), "--out", out, "--force"]
    commands = {
        "json": [COPY, str(file), out],
        "filter": base,
        "filter --near 0.8": [*base, "--near", "0.8"],
        "filter --tokenizer": [*base, "--tokenizer", str(folder / "tokenizer")],
    }
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    memory: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(rounds):
        for name, command in commands.items():
            took, held = run(command)
            print(f"{name}: {took:.1f} s, {held / 1e6:.0f} MB", file=sys.stderr, flush=True)
            seconds[name].append(took)
            memory[name].append(held)
    config = {"records": records, "words": WORDS, "vocabulary": VOCABULARY}
    rows = []
    for name in commands:
        ceiling = None if name == "json" else float(np.median(seconds["json"]))
        rows.append(results.row(name, "time", "s", seconds[name], ceiling=ceiling, config=config))
        if name != "json":
            rows.append(results.row(name, "peak memory", "bytes", memory[name], config=config))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--records", type=int, default=558_128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--no-save", action="store_true", help="leave results/ alone")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(Path(folder), arguments.records, arguments.rounds)
    if not arguments.no_save:
        results.write(Path(__file__).with_name("results") / "filter.jsonl", rows)
    print(json.dumps({"results": rows}))


if __name__ == "__main__":
    main()
