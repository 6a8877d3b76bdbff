"""Draw what `align bench step --out` wrote.

python benchmarks/plot_step.py benchmarks/results/step.jsonl docs/images/step.png
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from align.bench import results
from align.bench.step_plot import write_plot


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rows", type=Path)
    parser.add_argument("picture", type=Path)
    arguments = parser.parse_args()
    write_plot(results.read(arguments.rows), arguments.picture)


if __name__ == "__main__":
    main()
