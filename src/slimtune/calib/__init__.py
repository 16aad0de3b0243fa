"""Data on its way into a model: files to rows, rows to text, text to tokens, tokens to statistics of layers."""
