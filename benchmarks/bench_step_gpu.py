"""Cached, live and plain training steps of Qwen3-0.6B and 8B on one GPU, within ten minutes.

    python benchmarks/bench_step_gpu.py                            step-h200.jsonl
    python benchmarks/bench_step_gpu.py --out FILE train.compile=true

64 visual tokens, bf16, random weights, each loop at its best batch size. A part is `align bench
step` of one language model, in a process of its own that is ended when its time is up; the results
file is written anew after each part, with the rows of all that have come so far. Flags that are not
named here go to every part.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from align.bench import results

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True, slots=True)
class Part:
    """batch_sizes: to choose from. share: of the time that is left when it begins."""

    llm: str
    batch_sizes: str
    share: float


LAST_ROUND_S = 75.0
"""What a part may take after the last moment at which it begins a round."""
PARTS = (
    Part("Qwen3-0.6B", "64,128,256", 0.5),
    Part("Qwen3-8B", "16,32,64,128", 1.0),
)


def measure(part: Part, out: Path, flags: list[str], limit_s: float) -> str | None:
    """Rows go to `out`, also those of a part of the part. Returns what went wrong, if anything."""
    minutes = max(0.0, limit_s - LAST_ROUND_S) / 60
    argv = [
        sys.executable, "-m", "cli.align", "bench", "step", "--llm", part.llm, "--random-weights",
        "--tokens", "64", "--batch-size", part.batch_sizes, "--images", "512", "--out", str(out),
        "--dir", str(out.parent), "--minutes", f"{minutes:.2f}", *flags,
    ]  # fmt: skip
    process = subprocess.Popen(argv, cwd=ROOT, start_new_session=True)
    try:
        code = process.wait(limit_s)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # a session of its own: its loops and workers too
        process.wait()
        return f"not done within {limit_s:.0f} s"
    return f"exit code {code}" if code else None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/step-h200.jsonl")
    parser.add_argument("--minutes", type=float, default=9.5)
    arguments, flags = parser.parse_known_args()
    end = time.monotonic() + 60 * arguments.minutes
    rows = []
    failed = False
    with tempfile.TemporaryDirectory(prefix="bench-step-") as folder:
        for number, part in enumerate(PARTS):
            out = Path(folder) / f"{number}.jsonl"
            why = measure(part, out, flags, (end - time.monotonic()) * part.share)
            if why is not None:
                failed = True
                print(f"{part.llm}: {why}", file=sys.stderr)
            if out.exists():
                rows += results.read(out)
                results.write(arguments.out, rows)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
