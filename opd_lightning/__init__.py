"""OPD-Lightning: does on-policy distillation beat SFT and RL on my task, at what cost, and what does it forget?"""

__version__ = "0.1.0"
