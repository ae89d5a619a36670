"""The methods, one file each. Importing a method's file registers it: a new method adds one line here.

No method knows another; what two of them share is a Delta in a file of its own, in `deltas/`.
"""

from kitout.methods.adaptformer import AdaptFormer
from kitout.methods.bitfit import BitFit
from kitout.methods.compositions.composition import Composition
from kitout.methods.compositions.fusion import Fusion
from kitout.methods.compositions.gated import Gated
from kitout.methods.compositions.mam import MAM
from kitout.methods.compositions.mixture import Mixture
from kitout.methods.full_finetuning import FullFineTuning
from kitout.methods.houlsby import Houlsby
from kitout.methods.ia3 import IA3
from kitout.methods.lora import LoRA
from kitout.methods.parallel_adapter import ParallelAdapter
from kitout.methods.partial_finetuning import PartialFineTuning
from kitout.methods.pfeiffer import Pfeiffer
from kitout.methods.prefix_tuning import PrefixTuning
from kitout.methods.prompt_tuning import PromptTuning
from kitout.methods.ssf import SSF
from kitout.methods.vpt import VPT

__all__ = [
    "IA3",
    "MAM",
    "SSF",
    "VPT",
    "AdaptFormer",
    "BitFit",
    "Composition",
    "FullFineTuning",
    "Fusion",
    "Gated",
    "Houlsby",
    "LoRA",
    "Mixture",
    "ParallelAdapter",
    "PartialFineTuning",
    "Pfeiffer",
    "PrefixTuning",
    "PromptTuning",
]
