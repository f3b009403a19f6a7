"""``python -m todo_attn.cli`` is ``todo-attn``."""

from . import main

main()
