"""ToDo and DaTo on diffusers' pipelines and models."""

from .apply import apply_todo, remove_todo
from .dato import apply_dato, remove_dato, reset_dato
from .processor import ToDoProcessor
from .status import status

__all__ = ["ToDoProcessor", "apply_dato", "apply_todo", "remove_dato", "remove_todo", "reset_dato", "status"]
