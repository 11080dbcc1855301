"""Runs: a run's folder, its identity, status and files."""
