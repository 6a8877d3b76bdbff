"""Code that an exported folder carries, for `trust_remote_code`; copied there file by file.

The files import torch, transformers and each other only. `connector.py` stays here: in a folder the
others import the model's own core instead.
"""
