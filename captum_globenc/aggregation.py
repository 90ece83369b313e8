"""The rollout of the layers' contributions."""

from captum_globenc.contributions.rollout import Decomposition, decompose, sweep

__all__ = ["Decomposition", "decompose", "sweep"]
