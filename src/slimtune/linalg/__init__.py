"""Pure tensor mathematics: no modules, no models, no files."""
