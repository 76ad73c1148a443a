"""The Polynomial Mixer's operator; README.md beside this file holds the algebra."""

from pomscale.ops.pom.dispatch import is_path_forced, is_transformed, polynomial_mixer, polynomial_mixer_step
from pomscale.ops.pom.form import Form, FormName, check_count
from pomscale.ops.pom.masks import BlockCausal, Mask, Segments, check_mask, check_step_mask, dense_mask
from pomscale.ops.pom.operands import Context, Queries, check_tokens
from pomscale.ops.pom.rotary import check_rotary
from pomscale.ops.pom.split import Collectives, SplitTokens, TokenSplit, runs_of_frames
from pomscale.ops.pom.state import PomState

__all__ = [
    "BlockCausal",
    "Collectives",
    "Context",
    "Form",
    "FormName",
    "Mask",
    "PomState",
    "Queries",
    "Segments",
    "SplitTokens",
    "TokenSplit",
    "check_count",
    "check_mask",
    "check_rotary",
    "check_step_mask",
    "check_tokens",
    "dense_mask",
    "is_path_forced",
    "is_transformed",
    "polynomial_mixer",
    "polynomial_mixer_step",
    "runs_of_frames",
]
