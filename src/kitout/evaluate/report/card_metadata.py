"""The front matter of a model card, in the words that the Hugging Face hub accepts.

The hub refuses a push whose license is not on its list, whose base or data set is no id, or whose results lack a field;
`ModelCard.validate` asks it over the network, so the rules are kept here (huggingface/hub-docs: modelcard.md and
docs/hub/repositories-licenses.md, August 2026). huggingface_hub writes the YAML. It knows `RunSummary` and no model.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kitout.evaluate.compare import Comparison
from kitout.evaluate.report.summary import RunSummary

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

UNKNOWN_LICENSE = "unknown: see the base"
HUB_LICENSES = frozenset(
    """
    apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0 bigcode-openrail-m
    afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0 cc-by-2.0 cc-by-2.5
    cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0
    cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0 cdla-permissive-1.0
    cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0
    lgpl lgpl-2.1 lgpl-3.0 isc h-research intel-research lppl-1.3c ms-pl apple-ascl apple-amlr mpl-2.0 odc-by odbl
    openmdw-1.0 openmdw-1.1 openrail++ osl-3.0 postgresql ofl-1.1 ncsa unlicense zlib pddl lgpl-lr deepfloyd-if-license
    fair-noncommercial-research-license llama2 llama3 llama3.1 llama3.2 llama3.3 llama4 grok2-community gemma
    """.split()  # noqa: SIM905 - one a line would be eighty lines
)
"""All but `unknown` and `other`."""
MAX_NAME_CHARS = 96  # of an id
HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)  # of a data set: with an owner


def render_front_matter(s: RunSummary, comparison: Comparison | None) -> str:
    """YAML without its `---` lines. A built-in base or one in a folder has no `base_model`: the hub has no such id."""
    from huggingface_hub import ModelCardData

    method = re.match(r"\w+", s.method)
    dataset = _hub_dataset(s.data_name)
    results = list(_eval_results(s, comparison, dataset)) if comparison and s.data_name else []
    more: dict[str, Any] = {"base_model_relation": "adapter"} if s.hub_name else {}
    license_, license_name = _license_fields(s.license)
    data = ModelCardData(
        base_model=s.hub_name or None,
        datasets=[dataset] if dataset else None,
        library_name="kitout",
        license=license_,
        license_name=license_name,
        pipeline_tag=s.hub_task or None,
        tags=["kitout", "adapter", *([method[0].lower()] if method else [])],
        model_name=s.adapter if results else None,
        eval_results=results or None,
        **more,
    )
    return str(data.to_yaml())


def _license_fields(stated: str) -> tuple[str, str | None]:
    """The base's license as it states it: one of the hub's, or `other` with its name."""
    if stated in HUB_LICENSES:
        return stated, None
    name = _slug(stated)[:MAX_NAME_CHARS]
    if stated in ("", "other", "unknown", UNKNOWN_LICENSE) or not name:
        return "unknown", None
    return "other", name


def _eval_results(s: RunSummary, comparison: Comparison, dataset: str) -> Iterator[EvalResult]:
    from huggingface_hub import EvalResult

    for change in comparison.changes:
        if math.isfinite(change.tuned.value):  # a result without a number is refused
            yield EvalResult(
                task_type=s.hub_task or "other",
                dataset_type=dataset or _slug(s.data_name) or "data",
                dataset_name=s.data_name,
                metric_type=change.name,
                metric_name=change.title,
                metric_value=round(change.tuned.value, 6),
            )


def _hub_dataset(source: str) -> str:
    """The id of a data set of the hub (`org/name:config#500` -> `org/name`); "": it is a file or built in."""
    name = re.split(r"[:#\[]", source)[0]
    is_id = HUB_ID.fullmatch(name) and ".." not in name and "--" not in name and len(name) <= MAX_NAME_CHARS
    return name if is_id and not Path(name).suffix and not Path(name).exists() else ""


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9.+-]+", "-", text.lower()).strip("-.")
