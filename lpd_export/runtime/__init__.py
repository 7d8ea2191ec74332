"""Drives a bundle's graphs: one generator, one sampler, and an executor for each backend."""
