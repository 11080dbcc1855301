"""Environments: each answers the student's replies, as a `contracts.Environment`."""

from opd_lightning.environments.calculator import Calculator, calculator
from opd_lightning.environments.openenv import OpenEnv
from opd_lightning.environments.single_turn import SingleTurn, single_turn
from opd_lightning.environments.tool_use import ToolUse, tool_use
from opd_lightning.environments.user_model import UserModel, user_model
from opd_lightning.environments.user_simulator import UserSimulator, user_simulator

__all__ = [
    "Calculator",
    "OpenEnv",
    "SingleTurn",
    "ToolUse",
    "UserModel",
    "UserSimulator",
    "calculator",
    "single_turn",
    "tool_use",
    "user_model",
    "user_simulator",
]
