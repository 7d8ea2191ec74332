"""Bundles as a service: an HTTP API in OpenAI's form, shared batches, and a page."""
