# The types of the public names, for type checkers and editors; tests/test_public_names.py keeps it equal to the table.
from kitout import assess as assess
from kitout import errors as errors
from kitout import search as search
from kitout.align import _AlignModule
from kitout.delta import Delta as Delta
from kitout.evaluate.part_weights import attention as attention
from kitout.fuse.arithmetic import combine as combine
from kitout.fuse.convert import convert as convert
from kitout.fuse.extract import extract as extract
from kitout.interop.reference import reference as reference
from kitout.kit import Kit as Kit
from kitout.kit import attach as attach
from kitout.method import Method as Method
from kitout.method import register as register
from kitout.methods.adaptformer import AdaptFormer as AdaptFormer
from kitout.methods.bitfit import BitFit as BitFit
from kitout.methods.compositions.composition import Composition as Composition
from kitout.methods.compositions.fusion import Fusion as Fusion
from kitout.methods.compositions.gated import Gated as Gated
from kitout.methods.compositions.mam import MAM as MAM
from kitout.methods.compositions.mixture import Mixture as Mixture
from kitout.methods.full_finetuning import FullFineTuning as FullFineTuning
from kitout.methods.houlsby import Houlsby as Houlsby
from kitout.methods.ia3 import IA3 as IA3
from kitout.methods.lora import LoRA as LoRA
from kitout.methods.parallel_adapter import ParallelAdapter as ParallelAdapter
from kitout.methods.partial_finetuning import PartialFineTuning as PartialFineTuning
from kitout.methods.pfeiffer import Pfeiffer as Pfeiffer
from kitout.methods.prefix_tuning import PrefixTuning as PrefixTuning
from kitout.methods.prompt_tuning import PromptTuning as PromptTuning
from kitout.methods.ssf import SSF as SSF
from kitout.methods.vpt import VPT as VPT
from kitout.model_check.check import check as check
from kitout.peft_folders import load_peft as load_peft
from kitout.peft_folders import save_peft as save_peft
from kitout.predict.load import load as load
from kitout.route import Average as Average
from kitout.route import Mix as Mix
from kitout.route import Only as Only
from kitout.route import Stack as Stack
from kitout.runtime.graphs.compile_blocks import compile as compile  # noqa: A004
from kitout.runtime.graphs.compile_blocks import compiled as compiled
from kitout.train import _CallableModule
from kitout.version import __version__ as __version__

align: _AlignModule
train: _CallableModule
