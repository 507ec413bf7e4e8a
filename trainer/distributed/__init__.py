"""Ranks, device, collectives, signals, deadlines: everything that a workload must not know."""
