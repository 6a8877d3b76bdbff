"""The embedded default: a captioned-shapes set and two tiny checkpoints that need no hub."""
