"""The methods, one file each. Importing a method's file registers it: a new method adds one line here.

No method knows another; what two of them share is a Delta in a file of its own (`lowrank.py`).
"""

from kitout.methods.bitfit import BitFit
from kitout.methods.ia3 import IA3
from kitout.methods.lora import LoRA

__all__ = ["IA3", "BitFit", "LoRA"]
