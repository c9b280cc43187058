"""A moving average of a module's weights: steadier than the weights of any one step."""

from __future__ import annotations

import copy
from typing import Generic, TypeVar

import torch
from torch import nn

ModuleT = TypeVar("ModuleT", bound=nn.Module)


class MovingAverage(nn.Module, Generic[ModuleT]):
    """A shadow of a module that follows its weights slowly and is never trained itself.

    It is a part of the training state like any other module, so that an interrupted run continues
    with it.

    Args:
        source: the module to follow; the shadow starts as its copy.
        decay: share of itself that the shadow keeps in each step, in [0, 1).
    """

    def __init__(self, source: ModuleT, decay: float) -> None:
        super().__init__()
        self.shadow: ModuleT = copy.deepcopy(source).requires_grad_(False)
        self._decay = decay

    @torch.no_grad()
    def follow(self, source: ModuleT) -> None:
        """Move towards the source by one step: shadow = decay * shadow + (1 - decay) * source."""
        for mine, theirs in zip(self.shadow.parameters(), source.parameters(), strict=True):
            mine.lerp_(theirs.detach(), 1 - self._decay)

    def restart(self, source: ModuleT) -> None:
        """Become a copy of the source."""
        self.shadow.load_state_dict(source.state_dict())
