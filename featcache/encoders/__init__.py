"""Frozen vision encoders, loaded through transformers, and the pixels they are given.

    load.py           a name, hub id or folder -> Encoder
    encoder.py        Encoder: pixels -> features of the asked layers, in the memory there is
    preprocessing.py  Preprocessing: an image -> the pixels of the checkpoint's image processor
    tower.py          Tower: what all families of models have in common
    families.py       the families by model type; their classes: siglip, vit, convnext, any
    compiling.py      `torch.compile` of a tower

Adding a family is one subclass of `Tower` and its name in families.py; adding an encoder of a known
family is one entry of featcache/registry.py.
"""

from featcache.encoders.encoder import Encoded, Encoder
from featcache.encoders.load import load_encoder
from featcache.encoders.preprocessing import Pixels, Preprocessing, fit_of
from featcache.encoders.tower import RANDOM_REVISION, RANDOM_SEED

__all__ = [
    "RANDOM_REVISION",
    "RANDOM_SEED",
    "Encoded",
    "Encoder",
    "Pixels",
    "Preprocessing",
    "fit_of",
    "load_encoder",
]
