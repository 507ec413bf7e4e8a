"""One file a command of `python -m trainer`; each has `main(words)`, which returns the exit code."""
