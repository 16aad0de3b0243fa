"""Measuring a model: perplexity of a text, accuracy on tasks, and speed. Nothing here changes a model."""
