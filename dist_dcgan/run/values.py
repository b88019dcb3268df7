"""What a checkpoint's values may be: they may come from anybody, and training goes on from them."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, Field, FiniteFloat, model_validator

from shards.common.command_line import build
from shards.common.errors import UserError

_Count = Annotated[int, Field(ge=0, lt=10**18)]
_Int32 = Annotated[int, Field(ge=0, lt=2**31)]
"""What the loss scaler keeps in a tensor or passes to a kernel."""


class _Scaler(BaseModel, strict=True):
    """State of a loss scaler; empty in checkpoints of older versions, unless of fp16."""

    scale: float = Field(1.0, ge=0, le=3.4e38)
    growth_factor: FiniteFloat = 2.0
    backoff_factor: FiniteFloat = 0.5
    growth_interval: _Int32 = 2000
    growth_tracker: _Int32 = Field(0, alias="_growth_tracker")


class _Trend(BaseModel, strict=True, extra="forbid"):
    """The watchdog's averages, by the names in `training.watchdog.Trend`."""

    steps: _Count = 0
    gradient: float = 0.0
    fake: float = 0.0
    real: float = 0.0
    least_gradient: float = 0.0
    most_diversity: float = 0.0


class _Watchdog(BaseModel, strict=True):
    """State of the watchdog, by the names of its rules; unknown rules are ignored."""

    level: dict[str, _Count]
    since: dict[str, _Count]
    named: dict[str, bool]
    trend: _Trend = _Trend()
    """Not in checkpoints of older versions."""

    @model_validator(mode="after")
    def _whole(self) -> _Watchdog:
        if not self.level.keys() <= self.since.keys() & self.named.keys():
            raise ValueError("a rule lacks its step, or whether it was named")
        return self


class _Values(BaseModel, strict=True, extra="allow"):
    """Values by the names in `TrainState.values`; all but the step may be missing, which matters only to training."""

    step: _Count
    skipped_steps: _Count = 0
    global_batch: int = Field(1, ge=1, lt=10**18)
    wandb_run_id: str | None = None
    best_kid: FiniteFloat | None = None
    best_kid_extractor: str | None = None
    precision: str = ""
    watchdog: _Watchdog | None = None
    scaler_g: _Scaler = _Scaler()
    scaler_d: _Scaler = _Scaler()
    manifest_digest: str = ""
    config: dict[str, Any] = {}

    @model_validator(mode="after")
    def _scaled(self) -> _Values:
        for scaler in (self.scaler_g, self.scaler_d) if self.precision == "fp16" else ():
            if scaler.model_fields_set != _Scaler.model_fields.keys():
                raise ValueError("a loss scaler of fp16 is incomplete")
        return self


def checked_values(values: Any, step: int) -> dict[str, Any]:
    """Return the values of the checkpoint named by `step`; raises ValueError, in one line, if they are of no use."""
    if not isinstance(values, dict):
        raise ValueError("its values are no mapping")
    try:
        checked = build(_Values, values)
    except UserError as error:
        raise ValueError(str(error)) from None
    if checked.step != step:
        raise ValueError(f"its values are of step {checked.step}, its name is of step {step}")
    return checked.model_dump(exclude_unset=True, by_alias=True)
