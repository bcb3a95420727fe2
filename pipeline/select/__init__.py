"""Selection rules, one file each; recipe.py names them in its union of steps."""
