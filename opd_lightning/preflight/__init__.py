"""Preflight: checks of a run before training begins."""
