"""The trained network inside a pipeline: base and model, adapter, paths, randomness, devices."""
