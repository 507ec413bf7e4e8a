"""Whole objects at URLs, and what a run keeps there: checkpoints, metric log, lease, goodput."""
