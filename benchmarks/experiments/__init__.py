"""Kernels that may replace a shipped one once a GPU says so. No part of the package; nothing else imports them."""
