"""Is a bundle still the model? Polygraphy comparisons with the reference, and a verdict."""
