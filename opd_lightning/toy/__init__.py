"""The embedded world: tasks, models and their pre-training."""
