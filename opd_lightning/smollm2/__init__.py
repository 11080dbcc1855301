"""Deprecated name of `opd_lightning.models.smollm2`; its command works for one release."""
