"""Draw what `align bench store --out` or `align bench step --out` wrote.

python benchmarks/plot.py store benchmarks/results/store.jsonl docs/images/store.png
python benchmarks/plot.py step benchmarks/results/step.jsonl docs/images/step.png
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from align.bench import results
from align.bench.plot import write_plot as plot_store
from align.bench.step_plot import write_plot as plot_step

PLOTS = {"store": plot_store, "step": plot_step}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=PLOTS)
    parser.add_argument("rows", type=Path)
    parser.add_argument("picture", type=Path)
    arguments = parser.parse_args()
    PLOTS[arguments.what](results.read(arguments.rows), arguments.picture)


if __name__ == "__main__":
    main()
