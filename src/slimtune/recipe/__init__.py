"""Recipes: a list of steps, what it will cost, the run and its report."""
