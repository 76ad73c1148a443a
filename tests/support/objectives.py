"""The objectives of closed forms: each path with its exact sampling equation."""

from __future__ import annotations

from pomscale.diffusion.objectives import EpsPrediction, FlowMatching, Objective, XPrediction

FLOW, EPS = FlowMatching(), EpsPrediction()

UNCLAMPED = 1e-4
"""Clamp below the times of all grids of tests, so that the sampling equation is that of the path."""

EXACT: dict[str, Objective] = {
    "flow": FLOW,
    "eps": EPS,
    "x": XPrediction(UNCLAMPED),
    "x of noise scale 2": XPrediction(UNCLAMPED, 2.0),
}
