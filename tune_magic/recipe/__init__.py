"""Recipes: what is trained, typed and checked, with every fault named at once."""

from tune_magic.recipe.build import build_recipe, load_recipe, recipe_schema
from tune_magic.recipe.launch import LaunchOptions
from tune_magic.recipe.schema import DataOptions, EvalOptions, MethodOptions, Recipe

__all__ = [
    "DataOptions",
    "EvalOptions",
    "LaunchOptions",
    "MethodOptions",
    "Recipe",
    "build_recipe",
    "load_recipe",
    "recipe_schema",
]
