"""The part of a training recipe that says what is logged and when people are alerted."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveInt

from pomscale.config.section import Fraction, PositiveFloat, Section


class WandbConfig(Section):
    mode: Literal["online", "offline", "disabled"] = "offline"
    project: str = "pomscale"
    entity: str | None = None
    group: str | None = Field(None, description="Runs of one experiment; null = the run's own name.")
    tags: list[str] = Field([], description="Labels of the run in wandb.")


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
