"""What ToDo and DaTo are asked to do: validated plain data, JSON in and out. No torch, no diffusers."""

from .checks import ArgumentError
from .dato import DaToConfig
from .todo import ToDoConfig

__all__ = ["ArgumentError", "DaToConfig", "ToDoConfig"]
