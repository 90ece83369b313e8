"""The attribution methods, as Captum classes."""
