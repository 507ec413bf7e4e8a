"""Objects at URLs, and what a run keeps there: checkpoints, metric log, lease, goodput."""
