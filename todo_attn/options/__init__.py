"""What the commands are asked: validated plain data. No diffusers."""
