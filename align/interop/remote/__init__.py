"""Code that an exported folder carries, for `trust_remote_code`; copied there file by file.

The files import torch, transformers and each other only. `connector.py` is the one that is written
anew: it says which core the exported model has.
"""
