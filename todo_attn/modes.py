"""How coarse tokens may be taken. Here, without torch, for the configuration and for the ops alike."""

MODES = ("nearest", "nearest-exact", "mean")
