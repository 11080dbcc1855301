"""Parts of the training step: scoring, logging and checkpoints."""
