"""media_modules: which modules of a model of text and images see the images, and therefore not the rows of a batch.

One tiny forward of text alone runs everything that sees rows; what it leaves out sees images, videos or sounds. Where a
model does not run on text alone, all that lies apart from the token table's own stack counts as the images' part. It
knows no architecture.
"""

from __future__ import annotations

from kitout.base.eval_mode import eval_mode
from kitout.base.probe.dummy_batch import text_batch
from kitout.base.survey import Survey


def media_modules(survey: Survey) -> frozenset[str]:
    """The paths; none in a model that takes text alone or no text."""
    model = survey.model
    try:
        batch = text_batch(model)
    except Exception:
        return _apart_from_text(survey)
    if batch is None:
        return frozenset()
    run: set[str] = set()
    hooks = [m.register_forward_pre_hook(lambda _m, _x, path=path: run.add(path)) for path, m in model.named_modules()]
    try:
        with eval_mode(model):
            model(**batch)
    except Exception:
        return _apart_from_text(survey)
    finally:
        for handle in hooks:
            handle.remove()
    return frozenset(path for path, _ in model.named_modules() if path not in run)


def _apart_from_text(survey: Survey) -> frozenset[str]:
    """Everything but token tables, heads, and what the table's nearest stack shares with it and with no other stack."""
    tables = [s.path for s in survey.sites if s.role == "embed"]
    of_text = {*tables, *(s.path for s in survey.sites if s.role == "head")}
    text: set[str] = set()
    for table in tables:
        shared = {t.path: _common(t.path.split("."), table.split(".")) for t in survey.towers}
        nearest = max(shared, key=lambda path: (len(shared[path]), -path.count(".")), default="")
        around = ".".join(shared.get(nearest, []))
        alone = around and sum(f"{path}.".startswith(f"{around}.") for path in shared) == 1
        text.add(f"{around if alone else nearest}.")
    modules = (path for path, _ in survey.model.named_modules())
    return frozenset(path for path in modules if path not in of_text and not f"{path}.".startswith(tuple(text)))


def _common(a: list[str], b: list[str]) -> list[str]:
    return [x for i, x in enumerate(a) if a[: i + 1] == b[: i + 1]]
