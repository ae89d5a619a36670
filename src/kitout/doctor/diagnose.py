"""All checks in order: a check that fails is a finding too, so a broken torch does not end the others.

It knows the checks and nothing of what they look at.
"""

from __future__ import annotations

from kitout.doctor.diagnosis import Diagnosis, Finding
from kitout.doctor.machine import check_cache, check_device, check_system
from kitout.doctor.packages import check_imports, check_parts, check_versions
from kitout.format import single_line


def diagnose() -> Diagnosis:
    """Looks at this machine and installation; a few seconds, most of them the import of torch and transformers."""
    result = Diagnosis()
    for check in (check_versions, check_imports, check_system, check_device, check_cache, check_parts):
        try:
            check(result)
        except Exception as error:  # a check that fails must not hide what the others find
            name = check.__name__.removeprefix("check_")
            text = single_line(f"{type(error).__name__}: {error}", 300)
            result.findings.append(Finding(f"{name} could not be checked ({text})", "please report it with this line"))
    result.findings.sort(key=lambda finding: not finding.is_needed)
    return result
