"""Names of dtypes; without torch, for the options of every command."""

# Short name: torch's.
DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
