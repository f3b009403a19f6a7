"""ToDo in diffusers' models: everything here imports diffusers, and nothing outside does."""

from .apply import apply_todo, remove_todo
from .processor import ToDoProcessor

__all__ = ["ToDoProcessor", "apply_todo", "remove_todo"]
