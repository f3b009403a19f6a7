"""Times implementations side by side; ``todo-attn bench`` and a checkout's ``benchmarks`` are built on it."""
