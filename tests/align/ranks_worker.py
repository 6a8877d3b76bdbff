"""What each of the ranks in test_distributed.py runs: one training after the other, in one group.

argv: a JSON file, [[config.yaml, store, run], ...]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from align.config import load_config
from align.distributed import joined_ranks
from align.trainer import train

if __name__ == "__main__":
    torch.set_num_threads(1)
    with joined_ranks(torch.device("cpu")) as ranks:
        for config, store, run in json.loads(Path(sys.argv[1]).read_text()):
            train(load_config(config), [store], run.format(rank=ranks.index), resume=True)
