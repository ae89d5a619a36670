"""media_modules: which modules of a model of text and images see the images, and therefore not the rows of a batch.

One tiny forward of text alone runs everything that sees rows; what it leaves out sees images, videos or sounds. Where a
model does not run on text alone, all that lies apart from the text's token table counts as the images' part. It knows
no architecture.
"""

from __future__ import annotations

from typing import Any

from kitout.base.eval_mode import eval_mode
from kitout.base.probe.dummy_batch import text_batch
from kitout.base.survey import Survey


def media_modules(survey: Survey) -> frozenset[str]:
    """The paths; none in a model that takes text alone or no text."""
    model = survey.model
    run: set[str] = set()
    hooks = [m.register_forward_pre_hook(lambda _m, _x, path=path: run.add(path)) for path, m in model.named_modules()]
    try:
        batch = text_batch(model)
        if batch is None:
            return frozenset()
        with eval_mode(model):
            model(**batch)
    except Exception:
        return _apart_from_text(survey)
    finally:
        for handle in hooks:
            handle.remove()
    return frozenset(path for path, _ in model.named_modules() if path not in run)


def _apart_from_text(survey: Survey) -> frozenset[str]:
    """Everything outside of the module that holds the token table, but for other tables and the head."""
    model: Any = survey.model
    table = model.get_input_embeddings()
    own = next((path for path, m in survey.model.named_modules() if m is table), "")
    text = own.rpartition(".")[0]
    of_text = {s.path for s in survey.sites if s.role in ("embed", "head")}
    return frozenset(
        path
        for path, _ in survey.model.named_modules()
        if path not in of_text and not f"{path}.".startswith(f"{text}.")
    )
