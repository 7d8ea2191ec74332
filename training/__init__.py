"""How the demo model came about: the training loop, its data, and what is trained."""
