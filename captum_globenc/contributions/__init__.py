"""What each token takes from every other, layer by layer and over all layers."""
