"""A distributed trainer for image classifiers and GANs. Read README.md, then workload.py, engine.py, state.py."""

__version__ = "0.1.0"
