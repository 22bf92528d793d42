"""Recipes for other programs: one converter a file, each made from a run's recipe and plan."""
