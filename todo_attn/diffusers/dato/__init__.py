"""DaTo (arXiv 2501.00375) on a UNet: token pruning in its finest self-attentions, and a block cache."""

from .apply import apply_dato, remove_dato, reset_dato

__all__ = ["apply_dato", "remove_dato", "reset_dato"]
