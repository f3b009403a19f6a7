"""What ToDo and DaTo are asked to do: validated plain data, JSON in and out. No torch, no diffusers."""

from .dato import DaToConfig
from .todo import ToDoConfig

__all__ = ["DaToConfig", "ToDoConfig"]
