"""todo_attn for ComfyUI: ToDo and DaTo's token pruning as nodes that patch a UNet's self-attention."""

from .nodes import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
