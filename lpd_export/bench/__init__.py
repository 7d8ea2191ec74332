"""How fast a bundle is: measured, beside the least time that a device allows."""
