"""Data: prompts by (seed, position), rendering, and micro-batches."""
