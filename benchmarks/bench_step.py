"""A training step on stored features, beside the same step with the encoder in it.

    python benchmarks/bench_step.py            tiny and mid LLM, full-size encoder: 12 minutes
    python benchmarks/bench_step.py --quick    tiny LLM, one round

It is `align bench step --json` with its flags; KEY=VALUE changes a setting of the run. A full run
writes benchmarks/results/step.jsonl, unless --out says otherwise. docs/performance.md says what is
measured; benchmarks/bench_step_gpu.py is for a GPU.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cli import console
from cli.align import group


def main() -> None:
    flags = sys.argv[1:]
    if not any(flag == "--quick" or flag.startswith("--out") for flag in flags):
        flags += ["--out", str(Path(__file__).with_name("results") / "step.jsonl")]
    raise SystemExit(console.run(group, ["bench", "step", "--json", *flags]))


if __name__ == "__main__":
    main()
