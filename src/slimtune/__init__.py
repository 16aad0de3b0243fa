"""slimtune: make a language model small and fine-tune it, from one recipe."""

__version__ = "0.1.0"
