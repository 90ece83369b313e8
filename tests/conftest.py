from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.modules import module as module_hooks

_GLOBAL_HOOKS = (
    "_global_forward_hooks",
    "_global_forward_pre_hooks",
    "_global_backward_hooks",
    "_global_backward_pre_hooks",
)
_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
)


def left_behind(model: nn.Module) -> list[str]:
    """Every trace that an attribution could leave on a model or on torch."""
    traces = [name for name in _GLOBAL_HOOKS if getattr(module_hooks, name)]
    for name, module in model.named_modules():
        traces += [f"{name}.{hooks}" for hooks in _HOOKS if getattr(module, hooks)]
        config = getattr(module, "config", None)
        if getattr(config, "_attn_implementation", None) == "captum_globenc":
            traces.append(f"{name}.config._attn_implementation")
    return traces


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
