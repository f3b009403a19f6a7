"""The options of the commands, as validated plain data. No diffusers."""
