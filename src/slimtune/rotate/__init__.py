"""Orthogonal changes of basis that leave a model's outputs alone and spread its activations evenly."""
