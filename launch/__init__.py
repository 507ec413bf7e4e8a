"""Runs the trainer on a machine or a Slurm cluster: pure functions from a Job and a Site to commands and scripts.

Imports no torch: `python -m launch` must start at once on a login node.
"""


class Refused(Exception):
    """A job that cannot work, or a mistake in the command: a line per problem, exit code 2."""
