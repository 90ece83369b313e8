"""The table of families, and where the parts of a model are."""
