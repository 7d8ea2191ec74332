"""The folder that a build leaves: its manifest, its files, its class names."""
