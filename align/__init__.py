"""Training of connectors between a frozen vision encoder and a frozen language model."""
