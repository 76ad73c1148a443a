"""The operator in Triton kernels, forward and backward, for CUDA (and, under TRITON_INTERPRET=1, for CPU tensors).

    no mask, padding, block-causal, segments:   sums of the features of each group of tokens (`grouped.aggregate`),
                                                means by torch, gates and selection (`grouped.select`)
    causal:                                     sums before each item of tokens, then a scan (`scanned.scan`)

Kept for backward are u, the gates, and one fp32 vector per group. Gates of heads, few numbers per query, and the output
map that they fold with are torch's, differentiated by autograd.
"""

from pomscale.ops.pom.triton_path.path import polynomial_mixer, polynomial_mixer_step

__all__ = ["polynomial_mixer", "polynomial_mixer_step"]
