"""How near an extraction comes to the bare encoder, and what a second worker brings.

    python benchmarks/bench_extract.py                    siglip2-so400m; on 2 cores 10 minutes
    python benchmarks/bench_extract.py --model siglip2-base-224 --images 128 --workers 2
    python benchmarks/bench_extract.py --model tiny --quick

`align bench extract` says what is measured. Results: benchmarks/results/extract.jsonl.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cli.align import group
from cli.console import run

if __name__ == "__main__":
    sys.exit(run(group, ["bench", "extract", *sys.argv[1:]]))
