"""Blocks that more than one workload uses."""
