"""The trained network in a pipeline: base and model, LoRA, paths, random numbers, devices, loading."""
