"""The whole mixer as one operator: linear maps, polynomial, aggregation, gate, and all gradients."""

import pomscale.ops.pom.whole.flops  # noqa: F401  # registers the formulas
from pomscale.ops.pom.whole.function import mix
from pomscale.ops.pom.whole.operands import Memory, Weights

__all__ = ["Memory", "Weights", "mix"]
