"""Methods by name, and texts explained by several of them."""
