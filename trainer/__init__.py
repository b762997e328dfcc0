"""The learning: model, step, loop, evaluation, checkpoints, export."""
