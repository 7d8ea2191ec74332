"""What this machine has, and what can be built and run on it."""
