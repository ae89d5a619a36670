# The types of the public names, for type checkers and editors; tests/test_public_names.py keeps it equal to the table.
from typing import Any

from kitout import errors as errors
from kitout.kit.delta import Delta as Delta
from kitout.kit.kit import Kit as Kit
from kitout.kit.kit import attach as attach
from kitout.kit.kit import load_peft as load_peft
from kitout.kit.kit import save_peft as save_peft
from kitout.kit.method import Method as Method
from kitout.kit.method import register as register
from kitout.kit.route import Mix as Mix
from kitout.kit.route import Stack as Stack
from kitout.methods.adaptformer import AdaptFormer as AdaptFormer
from kitout.methods.bitfit import BitFit as BitFit
from kitout.methods.full import FullFineTuning as FullFineTuning
from kitout.methods.houlsby import Houlsby as Houlsby
from kitout.methods.ia3 import IA3 as IA3
from kitout.methods.lora import LoRA as LoRA
from kitout.methods.parallel import ParallelAdapter as ParallelAdapter
from kitout.methods.partial import PartialFineTuning as PartialFineTuning
from kitout.methods.pfeiffer import Pfeiffer as Pfeiffer
from kitout.methods.prefix import PrefixTuning as PrefixTuning
from kitout.methods.prompt import PromptTuning as PromptTuning
from kitout.methods.ssf import SSF as SSF
from kitout.methods.vpt import VPT as VPT
from kitout.version import __version__ as __version__

train: Any
