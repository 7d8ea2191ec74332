"""How good images are: features of them, and the distances and shares that follow."""
