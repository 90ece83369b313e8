r"""DecompX with biases: a forward decomposition in which tokens take the biases, too.

Every vector behind the embedding block is carried as the sum of one part per token.
Linear maps, residuals and attention act on the parts; deviations of norms, attention
probabilities and the slopes :math:`f(u)/u` of activations are those of the run. A bias
is shared among the parts of the vector that it is added to (see
:mod:`captum_globenc.linearization.spreading.shares`), so that in the end the parts are
the output.

The order in a layer: attention's sum over sources; the residual; the bias of
attention's values and output; the norm, its bias; the first map of the feed-forward
part, its bias; the activation; the second map, its bias; the residual; the norm, its
bias. In front of the first attention each vector belongs to its own token, with all
biases in it. In layers that normalise first, and elsewhere, a bias is spread where it
is added. Of a gated feed-forward part the activated factor is a constant.

The cost grows with the tokens: the model's maps run on tokens² vectors. In the top
layer only those rows are made that the output is made of. Memory, one example at a
time: three tensors of tokens² × hidden size, a few of ``decomposition.BLOCK`` numbers,
and, for the run itself, what training keeps for a backward pass.

Source: DecompX, Modarressi et al. 2023 (arXiv:2306.02873).
"""

from captum_globenc.linearization.spreading.spread import Spread, spread

__all__ = ["Spread", "spread"]
