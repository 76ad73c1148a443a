"""`pomscale export`: the weights of a run as a folder to use or to publish."""

from __future__ import annotations

from pathlib import Path

from pomscale.pretrained.weights import Precision, open_weights, parameter_shapes, write_weights


def export(path: Path, out: Path, *, weights: str = "ema", dtype: Precision = "fp32") -> None:
    """Write one set of weights of a run, checkpoint or exported folder to the new folder `out`.

    weights: as for `load_pretrained`; whichever it is, it stands for the model in `out`. In fp32 the loaded model gives
    bit-equal outputs. Raises InputError if there are no such weights, or something is at `out` already.
    """
    source = open_weights(path)
    name = source.resolve(weights)
    source.check(name)
    shapes = parameter_shapes(source.card.model)
    card = source.card.model_copy(update={"averages": () if name == "model" else (name,)})
    tensors = (tensor for _, tensor in source.stream(name, shapes))
    write_weights(out, card, {**source.provenance, "weights": name}, shapes, {name: tensors}, dtype)
