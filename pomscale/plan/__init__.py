"""Cost and memory of a run by formulas, without torch, before a GPU is asked for."""

from pomscale.plan.model_cost import forward_flops, num_parameters, training_flops

__all__ = ["forward_flops", "num_parameters", "training_flops"]
