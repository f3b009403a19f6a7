"""todo_attn for ComfyUI: ToDo and DaTo's token pruning as nodes that patch a UNet's self-attention."""

try:
    import todo_attn  # noqa: F401
except ImportError as error:
    raise ImportError(
        "the todo_attn nodes need the Python package todo_attn (and torch 2.10 or later) in ComfyUI's own Python: "
        f"python -m pip install todo_attn. Python said: {error}"
    ) from error

from .nodes import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
