"""From a request to a bundle."""
