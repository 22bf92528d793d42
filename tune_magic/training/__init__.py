"""The training core: engine, loop, checkpoints."""
