"""Training and evaluation: recipes, the loop, the run folder."""
