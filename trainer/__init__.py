"""A distributed trainer for image classifiers and GANs. Start at README.md, then workload.py and engine.py."""

__version__ = "0.1.0"
