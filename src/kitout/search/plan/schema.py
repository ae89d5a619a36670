"""A search in one object: a run, the space of designs around it, what they may cost, and how the best is confirmed.

The same schema serves Python, YAML and the command line: `SearchPlan.model_json_schema()`. Frozen and keyword only. It
opens no file and knows no model; what the plan says of its run is checked by the run's own schema.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from kitout.search.plan.space import SpaceConfig
from kitout.train.config.error_messages import JOIN
from kitout.train.config.schema import RunConfig
from kitout.train.config.sections import ConfigSection
from kitout.train.config.seeds import Seeds


class BudgetConfig(ConfigSection):
    """What one candidate may cost, and all of them together."""

    max_trainable_parameters: int | None = Field(default=None, gt=0)
    """Of one candidate, its heads included. One that has more is never trained; the run's own design is then trained
    for comparison alone."""
    max_bytes: int | None = Field(default=None, gt=0)
    """Of one candidate's file, in bytes."""
    max_latency: float | None = Field(default=None, gt=1)
    """Most that a forward with the candidate active may take, as a multiple of the frozen model's: 1.10."""
    examples: int | None = Field(default=None, gt=0)
    """That all candidates together are trained on, from the first rung to the last, without the confirmation. Default:
    half as many again as the rungs need, so that candidates which do not differ may stay."""


class GoalConfig(ConfigSection):
    """What the best design is best in."""

    metric: str | None = None
    """On the validation split; default: the run's headline metric (accuracy, where answers are a closed set)."""
    max_forgetting: float | None = Field(default=None, ge=0)
    """Most that the bits per byte of `wiki` may rise over the base's; default: it is not measured."""
    against: tuple[Literal["trainable_parameters", "latency", "forgetting"], ...] = ()
    """What the metric is traded against: candidates then survive by their place in the Pareto order and are proposed by
    NSGA-II. Default: the metric alone, proposed by TPE; the report has the fronts all the same."""

    @model_validator(mode="after")
    def _check_forgetting(self) -> GoalConfig:
        if "forgetting" in self.against and self.max_forgetting is None:
            raise ValueError("max_forgetting: forgetting is measured where this is set: write one, such as 0.05")
        return self


class HalvingConfig(ConfigSection):
    """Successive halving: few steps for all, more for the better ones."""

    factor: int = Field(default=4, ge=2)
    """One in so many candidates goes on from a rung to the next."""
    first: float = Field(default=0.0625, gt=0, le=1)
    """The part of a whole training that the first rung is."""


class ConfirmConfig(ConfigSection):
    """How the designs of the front are judged: trained anew, on the untouched test split."""

    seeds: Seeds = (0, 1, 2)
    """Each design is trained once with each; from 3 of them there are verdicts."""
    designs: int = Field(default=3, gt=0)
    """Of the front at most, besides the run's own design."""


class SearchPlan(ConfigSection):
    """Everything a search depends on."""

    type_name: ClassVar[str] = "plan"

    run: RunConfig
    """Any run of `kitout train`: model, data and length of every candidate, and the design that is to be beaten."""
    space: SpaceConfig
    """The designs to choose from."""
    budget: BudgetConfig = BudgetConfig()
    goal: GoalConfig = GoalConfig()
    candidates: int = Field(default=16, ge=2, le=512)
    """Designs of the first rung, the run's own and those of the sites' ranking included."""
    halving: HalvingConfig = HalvingConfig()
    confirm: ConfirmConfig = ConfirmConfig()
    engine: Literal["local", "ray"] = "local"
    """What trains a rung: this process, as one run of all its candidates, or Ray Tune (extra `ray`), as several trials
    on several GPUs or machines. The decisions are the same."""
    trials: int | None = Field(default=None, gt=0)
    """With engine=ray: into how many trials a rung is divided. Default: one for each GPU; without one, as many as the
    CPUs have room for with the threads that this process takes."""
    warm: bool = False
    """Begin from the designs of the nearest finished runs (`kitout advise`), as far as the space has their methods."""
    seed: int = Field(default=0, ge=0)
    """Of the proposals, and of the candidates' initial values and order of examples."""
    out: Path = Path("runs/search")
    """Holds the rungs, the confirmation, the report and recommended.yaml."""

    @field_validator("run", mode="before")
    @classmethod
    def _is_settings(cls, value: Any) -> Any:
        if isinstance(value, str | Path):
            raise ValueError("write the run's settings here (model, data, ...), as in a run.yaml")
        return value

    @field_validator("space", mode="before")
    @classmethod
    def _name_alone(cls, value: Any) -> Any:
        return {"method": value} if isinstance(value, str | list | tuple) else value

    @field_validator("budget", "goal", "halving", "confirm", mode="before")
    @classmethod
    def _empty_section(cls, value: Any) -> Any:
        """A section whose settings are all commented out."""
        return {} if value is None else value

    @field_validator("run")
    @classmethod
    def _can_be_searched(cls, run: RunConfig) -> RunConfig:
        taken = {
            "jobs: a search varies one design, and its candidates are the jobs": bool(run.jobs),
            "train.seeds: the seeds are those of confirm.seeds": bool(run.train.seeds),
            "train.from: candidates of different designs start from no adapter": run.train.from_ is not None,
            "data.streaming: every rung trains on the same examples, which have to be known": run.data.streaming,
            "train.fsdp: a search runs in one process": run.train.fsdp,
        }
        found = [f"{text}: leave it out" for text, is_set in taken.items() if is_set]
        if run.data.validation == 0:
            found.append("data.validation: candidates are compared on the validation split, which 0 leaves empty")
        if run.data.test == 0:
            found.append("data.test: the best designs are judged on the test split, which 0 leaves empty")
        if found:
            raise ValueError(JOIN.join(found))
        return run

    @model_validator(mode="after")
    def _check_trials(self) -> SearchPlan:
        if self.trials is not None and self.engine != "ray":
            raise ValueError(
                f"trials={self.trials}: rungs are divided into trials with engine=ray: write it, or leave trials out"
            )
        return self

    def to_dict(self) -> dict[str, Any]:
        """As plain values, the way `load_plan` reads them."""
        plain = self.model_dump(mode="json", exclude={"run", "space"})
        return {"run": self.run.to_dict(), "space": self.space.to_dict(), **plain}
