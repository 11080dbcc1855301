"""Utilities that know nothing of the rest."""
