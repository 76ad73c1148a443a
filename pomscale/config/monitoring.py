"""The part of a training recipe that says what is logged and when people are alerted."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Field, PositiveInt

from pomscale.config.section import Fraction, PositiveFloat, Section

# Variables by which wandb takes what the recipe says here. WANDB_MODE has two old words.
_FIELDS = {"WANDB_MODE": "mode", "WANDB_PROJECT": "project", "WANDB_ENTITY": "entity", "WANDB_RUN_GROUP": "group"}
_OLD_MODES = {"dryrun": "offline", "run": "online"}


class WandbConfig(Section):
    mode: Literal["online", "offline", "disabled"] = "offline"
    project: str = "pomscale"
    entity: str | None = None
    group: str | None = Field(None, description="Runs of one experiment; null = the run's own name.")
    tags: list[str] = Field([], description="Labels of the run in wandb.")

    def overruled(self, environment: Mapping[str, str]) -> list[str]:
        """Return a line for each of wandb's variables that says otherwise than this recipe, which decides."""
        asked = {name: environment[name] for name in _FIELDS if environment.get(name)}
        if environment.get("WANDB_DISABLED", "").lower() in ("true", "1", "yes", "on"):
            asked.pop("WANDB_MODE", None)
            asked["WANDB_DISABLED"] = "disabled"
        lines = []
        for name, value in asked.items():
            field = _FIELDS.get(name, "mode")
            here = getattr(self, field)
            # Without an entity in the recipe, wandb takes that of the environment.
            if here != _OLD_MODES.get(value, value) and (field, here) != ("entity", None):
                lines.append(
                    f"{name} is set, and not obeyed: the recipe decides, and its wandb.{field} is "
                    f"{'the name of the run' if here is None else here}; change it there"
                )
        return lines


class AlertsConfig(Section):
    """Conditions of alerts, which go to wandb, the console and events.jsonl.

    Losses and gradients that are not finite, rollbacks and new starts always raise one.
    """

    min_goodput: Fraction | None = Field(
        0.5,
        description="Least share of the wall time that went into steps that count; time between starts and in the "
        "queue is left out. null = never.",
    )
    goodput_after_s: PositiveFloat = Field(3600.0, description="Wall time after which goodput is judged.")
    stall_factor: Annotated[float, Field(gt=1.0)] | None = Field(
        3.0,
        description="Alert once steps have been this many times slower than the median row, for a minute and two "
        "rows; null = never.",
    )


class MonitoringConfig(Section):
    every_samples: PositiveInt = Field(8192, description="Metrics are averaged and written this often.")
    wandb: WandbConfig = WandbConfig()
    alerts: AlertsConfig = AlertsConfig()
