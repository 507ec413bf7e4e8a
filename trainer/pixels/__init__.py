"""Gradients on pixels instead of weights: pictures that a trained network makes of an image."""
