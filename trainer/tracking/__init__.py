"""Where numbers and pictures go: console, metric log, W&B."""
