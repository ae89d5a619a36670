"""What `kitout doctor` finds on this machine. `diagnose()` looks at everything and changes nothing."""

from kitout.doctor.diagnose import diagnose
from kitout.doctor.diagnosis import Diagnosis, Finding, OptionalPart

__all__ = ["Diagnosis", "Finding", "OptionalPart", "diagnose"]
