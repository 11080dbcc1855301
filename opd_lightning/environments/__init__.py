"""Environments: each answers the student's replies, as a `contracts.Environment`."""

from opd_lightning.environments.calculator import Calculator, calculator
from opd_lightning.environments.single_turn import SingleTurn, single_turn

__all__ = ["Calculator", "SingleTurn", "calculator", "single_turn"]
