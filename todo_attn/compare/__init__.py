"""The same images by each method: made, measured, written and laid side by side."""
