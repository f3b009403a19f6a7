"""Timing things side by side: what ``todo-attn bench`` and a checkout's ``benchmarks`` are made of."""
