"""Many images: what each is made from, the files they go into, and who makes them."""
