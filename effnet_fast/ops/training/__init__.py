"""Training's ops: what a network's forward and backward are made of when only raw convolutions are kept between them.

A *producer* is a convolution that gives its raw result ``y`` and the statistics of it per channel, from one pass. Whoever reads
``y`` next normalises, activates and gates it as it reads: it is given

    norm  [3, C]: mean, scale and bias of ``u = scale * (y - mean) + bias``, with ``scale = weight / sqrt(var + eps)``
    gate  [N, C] or None: ``a = activation(u) * gate``

so neither ``u`` nor ``a`` is ever stored. The *backward* of a producer is given the gradient of what was read of ``y``, and three
coefficients per channel that the backward of a batch norm comes to (arXiv 1502.03167, section 3), with ``G`` the gradient of ``u``:

    gradient of y = coefficients[0] * G + coefficients[1] * (y - mean) + coefficients[2]

which needs the sums of ``G`` and of ``G * (y - mean)``. Those come from whoever made ``G``, in the same pass. No op here has a
gradient of its own: :mod:`effnet_fast.nn.training` is the autograd function over them.

Vectors, statistics and sums are fp32 beside fp32, bf16 and fp16 tensors, and fp64 beside fp64.
"""

from effnet_fast.ops.training.convolution import conv_backward, conv_stats, why_no_kernel
from effnet_fast.ops.training.normalization import norm_act, norm_act_mean, norm_act_sums, norm_coefficients, norm_vectors
from effnet_fast.ops.training.squeeze_excite import squeeze_excite_backward

__all__ = [
    "conv_backward",
    "conv_stats",
    "norm_act",
    "norm_act_mean",
    "norm_act_sums",
    "norm_coefficients",
    "norm_vectors",
    "squeeze_excite_backward",
    "why_no_kernel",
]
