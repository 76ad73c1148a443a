"""The Polynomial Mixer's operator; README.md beside this file holds the algebra."""

from pomscale.ops.pom.dispatch import polynomial_mixer, polynomial_mixer_step
from pomscale.ops.pom.masks import BlockCausal, Mask, check_mask, dense_mask
from pomscale.ops.pom.state import PomState, StateReduce

__all__ = [
    "BlockCausal",
    "Mask",
    "PomState",
    "StateReduce",
    "check_mask",
    "dense_mask",
    "polynomial_mixer",
    "polynomial_mixer_step",
]
