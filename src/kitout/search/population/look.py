"""The run of a plan, prepared once before anything is proposed: its data, its sites, its length, what heads cost.

Nothing is trained but two steps of the run's own design, for an estimate of time. It knows a plan and a prepared run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from kitout.base.survey import Survey
from kitout.errors import ConfigError, suggest
from kitout.evaluate.example_scores import keep_ratios
from kitout.evaluate.sets.suites import fetch_suite
from kitout.search.plan.load import examples_text
from kitout.search.plan.rungs import cost, plan_rungs
from kitout.search.plan.schema import SearchPlan
from kitout.search.population.design import Design, count_design
from kitout.search.population.forgetting import SUITE, check_forgets
from kitout.search.population.proposals import params_of
from kitout.search.population.rung import Length
from kitout.train.loop.trainer import StepDataset
from kitout.train.measure.evaluate import perfect_measures
from kitout.train.preflight.cost_estimate import estimate_cost
from kitout.train.run_folder import first_day
from kitout.train.setup.base_model import choose_placement
from kitout.train.setup.prepare import PreparedRun, prepare

DEFAULT = "default"  # the name of the run's own design
FEW_VALIDATION = 100  # fewer examples hardly tell two candidates apart
SPARE = 1.5  # of the examples that the rungs need, where the plan names no number


@dataclass(frozen=True)
class Look:
    """What is known before a design is proposed."""

    prepared: PreparedRun
    """The run with its own design."""
    length: Length
    """Of a whole training."""
    default: Design
    """The run's own design, with what it costs."""
    head_parameters: int
    """Of the heads that every candidate trains with its own."""
    max_examples: int
    """That all candidates together may be trained on."""
    seconds: float
    """Of one whole training, estimated; 0: not tried."""
    num_validation: int
    """Examples that candidates are compared on."""

    @property
    def survey(self) -> Survey:
        """The sites."""
        return self.prepared.kit.survey


def look_at(plan: SearchPlan, length: Length | None, log: Callable[[str], None]) -> Look:
    """Prepares the run. length: as an earlier start of the same search has found it; None: found here."""
    run = plan.run
    if length is not None:
        train = run.train.model_copy(update={"steps": length.steps, "epochs": None, "batch_size": length.batch_size})
        run = run.model_copy(update={
            "train": train.model_copy(update={"seed": length.seed}),
            "model": run.model.model_copy(update={"dtype": length.dtype}),
            "data": run.data.model_copy(update={"template_date": length.template_date}),
        })  # fmt: skip
    else:
        day = first_day(run)
        run = run.model_copy(update={"data": run.data.model_copy(update={"template_date": day})})
    run = run.model_copy(update={"output": run.output.model_copy(update={"name": DEFAULT})})
    prepared = prepare(run, choose_placement(run.model), log)
    job = prepared.jobs[0]
    _check_data(plan, prepared)
    found = length or _find_length(plan, prepared, run.data.template_date)
    count = prepared.kit.num_parameters(DEFAULT)
    lr = run.train.lr or run.method.training_defaults().lr
    own = count_design(run.method, prepared.kit.survey, count.heads)
    default = Design(
        DEFAULT, run.method, lr, "the run's own", params_of(run.method, lr, plan.space), own.trainable, own.bytes,
        own.over(plan.budget),
    )  # fmt: skip
    seconds = 0.0
    if length is None:
        steps = StepDataset(prepared.jobs)
        log("trying two steps of the run's own design, for their time ...")
        planned = [steps[i] for i in range(min(found.steps, len(steps)))]
        estimate = estimate_cost(prepared.kit, prepared.jobs, planned, run.train.micro_batch_size)
        seconds = estimate.seconds * found.steps / len(planned)
    rungs = plan_rungs(plan.candidates, plan.halving.factor, plan.halving.first)
    needed = round(cost(rungs) * found.steps * found.batch_size)
    most = plan.budget.examples or round(SPARE * needed)
    return Look(prepared, found, default, count.heads, most, seconds, len(job.validation))


def _check_data(plan: SearchPlan, prepared: PreparedRun) -> None:
    """ConfigError where there is nothing to compare candidates by."""
    dataset = prepared.first_dataset
    if not len(prepared.jobs[0].validation):
        raise ConfigError("candidates are compared on the validation split, which is empty: write run.data.validation")
    if not len(dataset.test):
        raise ConfigError("the best designs are judged on the test split, which is empty: write run.data.test")
    measures = perfect_measures(prepared, plan.run.evaluate)
    known = [name for name, one in measures.items() if keep_ratios({name: one})]
    metric = plan.goal.metric
    if metric is not None and metric in measures and metric not in known:
        raise ConfigError(f"goal.metric={metric} is no mean over examples, so it has no test: {suggest(metric, known)}")
    if metric is not None and metric not in measures:
        raise ConfigError(f"goal.metric={metric} is not measured here: {suggest(metric, known)}")
    if plan.goal.max_forgetting is not None:
        check_forgets(prepared)
        fetch_suite(SUITE, lambda _line: None)


def _find_length(plan: SearchPlan, prepared: PreparedRun, template_date: str | None) -> Length:
    """Steps and batch of a whole training: the run's own; where the run sets none, as many as the budget affords."""
    schedule = prepared.schedules[0]
    steps, batch = schedule.num_steps, schedule.batch_size
    rungs = plan_rungs(plan.candidates, plan.halving.factor, plan.halving.first)
    trainings = cost(rungs)
    given = plan.budget.examples
    if given is not None and given < round(trainings * steps * batch):
        affordable = int(given / (trainings * batch))
        if schedule.epoch_steps is None or affordable < len(rungs):
            needed = round(trainings * steps * batch)
            raise ConfigError(examples_text(given, needed, plan.candidates, trainings, steps, batch))
        steps = affordable
    if steps < len(rungs):
        raise ConfigError(
            f"a training of {steps} steps has no room for {len(rungs)} rungs: raise run.train.steps or halving.first"
        )
    seed = plan.seed
    while seed in plan.confirm.seeds:
        seed += 1
    dtype = str(prepared.kit.dtype).removeprefix("torch.")
    return Length(steps, batch, dtype, template_date, seed)
