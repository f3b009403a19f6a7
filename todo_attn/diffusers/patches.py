"""What is on a model already, of this package's and of others'."""

from __future__ import annotations

from torch import nn

from .processor import ToDoProcessor


def has_todo(model: nn.Module) -> bool:
    """Whether an attention of ``model`` has ToDo's processor, set by ``apply_todo`` or by hand."""
    return any(isinstance(getattr(module, "processor", None), ToDoProcessor) for module in model.modules())


def has_deepcache(model: nn.Module) -> bool:
    """Whether DeepCache has replaced the forward of ``model`` or of a part of it."""
    forwards = (module.__dict__.get("forward") for module in model.modules())
    return any((getattr(forward, "__module__", None) or "").startswith("DeepCache") for forward in forwards)
