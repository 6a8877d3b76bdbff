"""A cache of frozen vision-encoder features: encode once, read back at memory speed."""
