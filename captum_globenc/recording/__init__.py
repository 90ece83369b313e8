"""One run of a model, observed."""
