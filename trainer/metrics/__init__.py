"""How good generated samples are, and whether training is healthy."""
