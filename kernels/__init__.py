"""Triton kernels, imported as ``todo_attn.kernels``. Nothing here is imported before a kernel is asked for."""
