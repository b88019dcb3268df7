"""The training loop, the training step, and what they save and log."""
