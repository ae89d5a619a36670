"""Chat templates that print today's date, fixed to one day: a run that resumes tomorrow reads the same examples.

Such templates call `strftime_now("%d %b %Y")`, which transformers gives them. The calls are replaced by what they print
on that day; the rest of the template stays as it is. It knows no chat and no run.
"""

from __future__ import annotations

import re
from datetime import datetime
from typing import Any

_CALL = re.compile(r"""strftime_now\(\s*(?:format\s*=\s*)?(?P<quote>['"])(?P<format>[^'"\n]*)(?P=quote)\s*\)""")
_ANY_CALL = re.compile(r"strftime_now\s*\(")


def fix_template_date(tokenizer: Any, day: str) -> str:
    """Sets the tokenizer's templates to a day, YYYY-MM-DD. A warning if today's date is left somewhere, else ""."""
    templates = tokenizer.chat_template
    if isinstance(templates, dict):
        tokenizer.chat_template = {name: with_fixed_date(template, day) for name, template in templates.items()}
        templates = "".join(tokenizer.chat_template.values())
    elif templates:
        tokenizer.chat_template = templates = with_fixed_date(str(templates), day)
    call = _ANY_CALL.search(templates or "")
    return "" if call is None else (
        f"the chat template prints today's date in a format that it computes ({call.string[call.start() :][:40]!r}): "
        "tomorrow this run cannot be resumed, unless the date is written into the template (tokenizer.chat_template)"
    )  # fmt: skip


def with_fixed_date(template: str, day: str) -> str:
    """Calls whose format is not written out stay: only the template itself could compute it."""
    midnight = datetime.fromisoformat(day)
    return _CALL.sub(lambda call: f"{call['quote']}{midnight.strftime(call['format'])}{call['quote']}", template)
