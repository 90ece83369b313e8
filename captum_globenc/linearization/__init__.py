"""One backward pass through a model that is made linear, operation by operation."""
