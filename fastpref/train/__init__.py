"""The trainer: configuration, loop, engine, checkpoints, metrics."""
