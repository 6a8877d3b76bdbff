"""From records and stored features to the batches that the model sees."""
