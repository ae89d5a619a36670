"""Folders of the real peft library, both ways: nothing missing, nothing unexpected, the same logits and gradients.

Values are random everywhere, as after training; alpha differs from rank. Every model is built twice from its seed: one
for peft, one for kitout.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BartConfig, BartForConditionalGeneration

import kitout
import zoo
from kitout import IA3, BitFit, LoRA
from kitout.errors import FileError
from kitout.files.peft.config import target_modules_for
from work import at_most
from zoo import EXTRA, ZOO, out

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings(
    "ignore::UserWarning", "ignore::RuntimeWarning", "ignore::FutureWarning"
)  # peft's own

SPECIES = ZOO | EXTRA


def randomize(module: nn.Module, seed: int = 3) -> None:
    """As if trained: no adapter value is left where it started."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in sorted(module.named_parameters()):
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=draw) * (0.02 if "magnitude" in name else 0.1))


@dataclass
class Case:
    species: str
    config: Any
    method: type = LoRA
    heads: tuple[str, ...] = ()
    build: Callable[[], nn.Module] | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)  # settings the loaded method must have

    def base(self) -> nn.Module:
        return (self.build or SPECIES[self.species].build)()

    def batch(self) -> dict[str, Tensor]:
        return SPECIES[self.species].batch(3, 1)


def lora(**settings: Any) -> Any:
    return peft.LoraConfig(**({"r": 4, "lora_alpha": 10, "init_lora_weights": False} | settings))


def ia3(**settings: Any) -> Any:
    return peft.IA3Config(init_ia3_weights=False, **settings)


def scaled_bart() -> nn.Module:
    """Embeddings that multiply what they look up by sqrt(d)."""
    sizes = {"d_model": 48, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 80, "decoder_ffn_dim": 80}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
    config = BartConfig(vocab_size=99, max_position_embeddings=64, scale_embedding=True, **sizes, **heads)
    return zoo.randomize_model(BartForConditionalGeneration(config), seed=0)


CASES = {
    "llama": Case("llama", lora(target_modules=["q_proj", "v_proj"]), facts={"targets": "attn.q attn.v", "rank": 4}),
    "llama-regex": Case("llama", lora(target_modules=r".*\.layers\.1\..*(up|down)_proj")),
    "llama-all": Case("llama", lora(target_modules="all-linear"), facts={"alpha": 10.0}),
    "llama-rslora": Case("llama", lora(target_modules=["o_proj", "up_proj"], use_rslora=True), facts={"rslora": True}),
    "llama-dora": Case("llama", lora(target_modules="all-linear", use_dora=True), facts={"dora": True}),
    "llama-embed": Case("llama", lora(target_modules=["embed_tokens", "lm_head"])),
    "llama-embed-dora": Case("llama", lora(target_modules=["embed_tokens", "q_proj"], use_dora=True)),
    "llama-tied-embed": Case("llama-tied", lora(target_modules=["embed_tokens", "k_proj"])),
    "llama-layers": Case(
        "llama",
        lora(target_modules=["q_proj", "k_proj"], layers_to_transform=[1]),
        facts={"targets": "attn.q attn.k", "layers": "1"},
    ),
    "llama-patterns": Case(
        "llama",
        lora(
            target_modules=["q_proj", "v_proj", "down_proj"],
            rank_pattern={"v_proj": 2, "layers.1.self_attn.q_proj": 6},
            alpha_pattern={"down_proj": 3, r"^model.layers.0.*v_proj": 5},
        ),
    ),
    "llama-rank-by-role": Case(
        "llama", lora(target_modules=["q_proj", "v_proj"], rank_pattern={"v_proj": 2}),
        facts={"rank": {"attn.q": 4, "attn.v": 2}},
    ),
    "llama-ia3": Case(
        "llama", ia3(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]), IA3,
        facts={"targets": "attn.k attn.v in:mlp.down"},
    ),
    "qwen3": Case("qwen3", lora(target_modules=["q_proj", "v_proj", "gate_proj"])),
    "qwen3-dora": Case("qwen3", lora(target_modules=["q_proj", "o_proj"], use_dora=True, use_rslora=True)),
    "qwen3-ia3": Case("qwen3", ia3(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]), IA3),
    "gpt2": Case("gpt2", lora(target_modules=["c_attn"], fan_in_fan_out=True), facts={"targets": "attn.qkv"}),
    "gpt2-all": Case("gpt2", lora(target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True)),
    "gpt2-dora": Case("gpt2", lora(target_modules=["c_attn", "c_fc"], fan_in_fan_out=True, use_dora=True)),
    "gpt2-ia3": Case(
        "gpt2", ia3(target_modules=["c_attn", "mlp.c_proj"], feedforward_modules=["mlp.c_proj"], fan_in_fan_out=True),
        IA3,
    ),
    "gpt2-embed": Case("gpt2", lora(target_modules=["wte", "wpe"])),
    "neox": Case("gpt-neox", lora(target_modules=["query_key_value", "dense_h_to_4h"])),
    "bert-cls": Case(
        "bert", lora(target_modules=["query", "value"], task_type="SEQ_CLS"), heads=("classifier",),
    ),
    "bert-dora-bias": Case("bert", lora(target_modules=["query", "dense"], use_dora=True)),
    "bert-heads": Case(
        "bert",
        lora(target_modules=["key"], modules_to_save=["classifier", "pooler"]),
        heads=("bert.pooler", "classifier"),
    ),
    "bert-ia3": Case(
        "bert",
        ia3(target_modules=r".*(key|value|\d\.output\.dense)", feedforward_modules=r".*\d\.output\.dense"), IA3,
    ),
    "roberta-cls": Case("roberta", lora(target_modules=["query"], task_type="SEQ_CLS"), heads=("classifier",)),
    "t5": Case("t5", lora(target_modules=["q", "v"]), facts={"targets": "attn.q attn.v"}),
    "t5-self": Case("t5", lora(target_modules=r".*SelfAttention\.q"), facts={"targets": "self.q"}),
    "t5-dora": Case("t5", lora(target_modules=["q", "wo"], use_dora=True)),
    "t5-ia3": Case("t5", ia3(target_modules=["k", "v", "wo"], feedforward_modules=["wo"]), IA3),
    "bart": Case("bart", lora(target_modules=["q_proj", "fc1"], layers_to_transform=[1])),
    "bart-scaled-embed": Case("bart", lora(target_modules=r".*(encoder.embed_tokens|q_proj)"), build=scaled_bart),
    "vit": Case("vit", lora(target_modules=["q_proj"], modules_to_save=["classifier"]), heads=("classifier",)),
    "vit-conv": Case("vit", lora(target_modules=["projection", "q_proj"])),
    "vit-conv-dora": Case("vit", lora(target_modules=["projection", "q_proj"], use_dora=True)),
    "vit-ia3": Case("vit", ia3(target_modules=["k_proj", "v_proj", "fc2"], feedforward_modules=["fc2"]), IA3),
    "vit-conv-ia3": Case("vit", ia3(target_modules=["projection", "k_proj"], feedforward_modules=[]), IA3),
    "vit-conv-in-ia3": Case("vit", ia3(target_modules=["projection"], feedforward_modules=["projection"]), IA3),
    "swin": Case("swin", lora(target_modules=["q_proj", "reduction"])),
    "llama-embed-head": Case(
        "llama", lora(target_modules=["q_proj"], modules_to_save=["embed_tokens"]), heads=("model.embed_tokens",)
    ),
    "llama-tied-embed-head": Case(
        "llama-tied", lora(target_modules=["q_proj"], modules_to_save=["embed_tokens"]), heads=("model.embed_tokens",)
    ),
    "llama-tied-both-heads": Case(
        "llama-tied", lora(target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"]),
        heads=("lm_head", "model.embed_tokens"),
    ),
    "gpt2-both-heads": Case(
        "gpt2", lora(target_modules=["c_attn"], modules_to_save=["wte", "lm_head"], fan_in_fan_out=True),
        heads=("lm_head", "transformer.wte"),
    ),
    "t5-embed-head": Case("t5", lora(target_modules=["q"], modules_to_save=["shared"]), heads=("shared",)),
}  # fmt: skip


@pytest.fixture(params=CASES, ids=list(CASES))
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


def saved_by_peft(case: Case, folder: Path) -> Any:
    """A peft model with random adapter values, and its folder."""
    model = peft.get_peft_model(case.base(), case.config).eval()
    randomize(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder)
    return model


def in_kitout(case: Case, folder: Path) -> kitout.Kit:
    kit = kitout.attach(case.base())
    kitout.load_peft(kit, folder, "a")
    kit.use("a")
    return kit


def test_a_folder_of_peft_computes_the_same_here(case: Case, tmp_path: Path) -> None:
    model = saved_by_peft(case, tmp_path)
    kit = in_kitout(case, tmp_path)
    with torch.no_grad():
        there, here, off = (out(m(**case.batch())) for m in (model, kit, case.base()))
    assert (there - off).abs().max() > 1e-2  # or the comparison would say nothing
    torch.testing.assert_close(here, there, rtol=1e-5, atol=1e-5)
    method = kit["a"].method
    assert type(method) is case.method
    assert {k: getattr(method, k) for k in case.facts} == case.facts
    assert tuple(sorted(p.replace("/", ".") for p in kit["a"].heads)) == case.heads
    trainable = sum(p.numel() for p in kit["a"].parameters() if p.requires_grad)
    assert trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_a_folder_of_ours_computes_the_same_in_peft(case: Case, tmp_path: Path) -> None:
    saved_by_peft(case, tmp_path / "theirs")
    kit = in_kitout(case, tmp_path / "theirs")
    randomize(kit["a"], seed=5)
    kitout.save_peft(kit, "a", tmp_path / "ours")
    model, report = loaded_by_peft(case.base(), tmp_path / "ours")
    assert not report.missing_keys
    assert not report.unexpected_keys
    with torch.no_grad():
        there, here = (out(m(**case.batch())) for m in (model, kit))
    torch.testing.assert_close(there, here, rtol=1e-5, atol=1e-5)


def loaded_by_peft(base: nn.Module, folder: Path) -> tuple[Any, Any]:
    """The peft model, and what its loader says of missing and unexpected keys."""
    config = peft.PeftConfig.from_pretrained(folder)
    model = peft.get_peft_model(base, config, adapter_name="a").eval()
    state = load_file(folder / "adapter_model.safetensors")
    report = peft.set_peft_model_state_dict(model, state, adapter_name="a")
    report.missing_keys[:] = [k for k in report.missing_keys if ".a." in k or k.endswith(".a")]
    return model, report


def test_the_one_line_that_users_write(tmp_path: Path) -> None:
    case = CASES["llama"]
    kit = kitout.attach(case.base())
    kit.add("a", LoRA(rank=4, alpha=6))
    randomize(kit["a"])
    kit.use("a")
    kitout.save_peft(kit, "a", tmp_path / "ours")
    model = peft.PeftModel.from_pretrained(case.base(), tmp_path / "ours").eval()
    with torch.no_grad():
        torch.testing.assert_close(out(model(**case.batch())), out(kit(**case.batch())), rtol=1e-5, atol=1e-5)
        assert model.generate(**case.batch(), max_new_tokens=2).shape[0] == 3


def test_no_file_says_where_the_base_lay(tmp_path: Path) -> None:
    ZOO["llama"].build().save_pretrained(tmp_path / "tiny")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "tiny")
    kit = kitout.attach(base)
    kit.add("mine", LoRA(rank=2))
    kitout.save_peft(kit, "mine", tmp_path / "peft")
    config = tmp_path / "peft" / "adapter_config.json"
    assert json.loads(config.read_text())["base_model_name_or_path"] == "tiny"
    config.write_text(config.read_text().replace('"tiny"', json.dumps(str(tmp_path / "tiny"))))  # as others write it
    kitout.load_peft(kit, tmp_path / "peft", "theirs")
    kit.save("theirs", tmp_path / "own")
    assert str(tmp_path) not in (tmp_path / "own" / "adapter.json").read_text()


def test_names_with_the_same_end() -> None:
    everything = ["a", "a.up", "b.up", "b.x.up", "b.x", "up"]
    assert target_modules_for(["a.up", "b.up", "b.x.up", "up"], everything)["target_modules"] == ["up"]
    assert target_modules_for(["a.up", "b.up"], everything)["target_modules"] == ["a.up", "b.up"]
    assert target_modules_for(["up"], everything)["target_modules"] == "up"  # a list would take a.up along
    both = target_modules_for(["b.x.up", "b.up"], everything, ["b.up"])
    assert both == {"target_modules": ["b.up", "b.x.up"], "feedforward_modules": ["b.up"]}
    assert target_modules_for(["a.up", "up"], everything, ["up"])["feedforward_modules"] == "up"


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert-cls", "llama-embed", "t5", "llama-rslora", "llama-patterns"])
def test_gradients_are_the_same(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    model = saved_by_peft(case, tmp_path)
    kit = in_kitout(case, tmp_path)
    for m in (model, kit):  # in fp64, where nothing but the formula can differ
        out(m.double()(**case.batch())).square().mean().backward()
    theirs = {
        k.removeprefix("base_model.model.").replace(".default", "").replace("modules_to_save.", ""): p.grad
        for k, p in model.named_parameters()
        if p.grad is not None
    }
    ends = {"a": (".lora_A.weight", ".lora_embedding_A"), "b": (".lora_B.weight", ".lora_embedding_B")}
    count = 0
    for site in kit["a"].sites:
        for own, value in kit["a"].delta(site).named_parameters():
            there = next(theirs[site.path + e] for e in ends[own] if site.path + e in theirs)
            torch.testing.assert_close(value.grad, there, rtol=1e-8, atol=1e-10)
            count += 1
    for path, head in kit["a"].heads.items():
        for own, value in head.module.named_parameters():
            torch.testing.assert_close(value.grad, theirs[f"{path}.{own}"], rtol=1e-8, atol=1e-10)
            count += 1
    assert count == len(theirs)


# --- what only we can do, in PEFT's terms ----------------------------------------------------------------------------


def exported(kit: kitout.Kit, species: str, folder: Path) -> tuple[Tensor, Tensor]:
    """Logits of the active adapter in kitout, and in peft after it was saved and loaded."""
    specimen = SPECIES[species]
    kitout.save_peft(kit, "a", folder)
    model, report = loaded_by_peft(specimen.build(), folder)
    assert not report.missing_keys
    assert not report.unexpected_keys
    with torch.no_grad():
        return out(kit(**specimen.batch(3, 1))), out(model(**specimen.batch(3, 1)))


@pytest.mark.parametrize(
    ("species", "method", "strength"),
    [
        ("llama", LoRA(rank=4, alpha=6, init="pissa"), 1.0),
        ("llama", LoRA(rank=4, alpha=6, init="pissa", rslora=True), 0.7),
        ("llama", LoRA(rank=4, alpha=6), -0.5),
        ("llama", IA3(), 0.3),
        ("llama", LoRA(rank={"attn.*": 4, "mlp.*": 2}, alpha={"attn.*": 3, "mlp.*": 9}, targets="attn.q mlp.up"), 1.0),
        ("gpt2", LoRA(rank=4, alpha=6, targets="attn.q attn.v"), 1.0),
        ("gpt2", LoRA(rank=4, alpha={"*": 3.0}, targets="attn.q attn.k attn.v", init="pissa"), 0.5),
        ("gpt2", IA3(targets="attn.k attn.v"), 0.5),
        ("gpt-neox", LoRA(rank=4, alpha=6, targets="attn.q attn.v"), 1.0),
        ("gpt-neox", IA3(), 1.0),
        ("falcon", LoRA(rank=3, alpha=6, targets="attn.q attn.v"), 1.0),
        ("phi3", LoRA(rank=3, alpha=6, targets="attn.q attn.v"), 1.0),
        ("bart", LoRA(rank=3, alpha=6, targets="cross.q embed"), 1.0),
        ("vit", LoRA(rank=3, alpha=6, targets="patch attn.q"), 0.5),
    ],
)
def test_export_of_what_peft_has_no_setting_for(
    species: str, method: kitout.Method, strength: float, tmp_path: Path
) -> None:
    kit = kitout.attach(SPECIES[species].build())
    kit.add("a", method)
    randomize(kit["a"])
    kit.strength("a", strength)
    kit.use("a")
    here, there = exported(kit, species, tmp_path / "out")
    with torch.no_grad(), kit.use(None):
        assert (out(kit(**SPECIES[species].batch(3, 1))) - here).abs().max() > 1e-3
    torch.testing.assert_close(there, here, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("species", "method", "strength", "reason"),
    [
        ("bert", BitFit(), 1.0, "BitFit"),
        ("llama", LoRA(targets="in:mlp.down"), 1.0, "its input"),
        ("llama", LoRA(dora=True), 0.5, "strength"),
        ("gpt2", LoRA(dora=True, targets="attn.q"), 1.0, "only some"),
        ("llama", IA3(targets="attn.q in:attn.q"), 1.0, "this one both"),
        ("llama", IA3(targets="norm"), 1.0, "no IA3 over LlamaRMSNorm"),
    ],
)
def test_export_refuses_with_the_reason(
    species: str, method: kitout.Method, strength: float, reason: str, tmp_path: Path
) -> None:
    kit = kitout.attach(SPECIES[species].build())
    kit.add("a", method)
    kit.strength("a", strength)
    with pytest.raises(FileError, match="has no equivalent in PEFT") as caught:
        kitout.save_peft(kit, "a", tmp_path / "out")
    assert reason in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_heads_that_peft_cannot_rebuild_are_refused(tmp_path: Path) -> None:
    kit = kitout.attach(ZOO["bert"].build())
    kit.add("a", LoRA(), heads={"classifier": nn.Sequential(nn.Linear(48, 5))})
    with pytest.raises(FileError, match="PEFT copies the base's Linear"):
        kitout.save_peft(kit, "a", tmp_path / "out")


def test_folders_of_others_are_not_overwritten(tmp_path: Path) -> None:
    kit = kitout.attach(ZOO["llama"].build())
    kit.add("a", LoRA())
    kit.save("a", tmp_path / "ours")
    with pytest.raises(FileError, match=r"adapter\.json"):
        kitout.save_peft(kit, "a", tmp_path / "ours")
    kitout.save_peft(kit, "a", tmp_path / "theirs")
    kitout.save_peft(kit, "a", tmp_path / "theirs")
    with pytest.raises(FileError, match=r"kitout\.load_peft"):
        kit.load(tmp_path / "theirs")
    with pytest.raises(FileError, match=r"kit\.load"):
        kitout.load_peft(kit, tmp_path / "ours", "b")


# --- files that must be refused --------------------------------------------------------------------------------------

UNSUPPORTED = {
    "use_qalora": True,
    "arrow_config": {"top_k": 1},
    "trainable_token_indices": [1, 2],
    "layer_replication": [[0, 1]],
    "megatron_config": {"a": 1},
    "alora_invocation_tokens": [3],
    "target_parameters": ["experts.w"],
    "use_bdlora": {"a": 1},
    "kasa_config": {"a": 1},
    "velora_config": {"a": 1},
    "monteclora_config": {"a": 1},
    "ensure_weight_tying": True,
    "bias": "some",
    "init_lora_weights": "pissa_niter_4",
    "a_field_of_next_year": 1,
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    saved_by_peft(CASES["llama"], tmp_path / "peft")
    return tmp_path / "peft"


def edit(folder: Path, **fields: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def refused(folder: Path) -> str:
    """The message of a load that must be refused and must change nothing."""
    kit = kitout.attach(ZOO["llama"].build())
    kit.add("old", LoRA())
    with pytest.raises(FileError) as caught:
        kitout.load_peft(kit, folder, "a")
    assert kit.names == ["old"]
    return str(caught.value)


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_fields_that_change_the_function_are_named(name: str, folder: Path) -> None:
    edit(folder, **{name: UNSUPPORTED[name]})
    assert name in refused(folder)


def test_all_of_them_at_once(folder: Path) -> None:
    edit(folder, **UNSUPPORTED)
    message = refused(folder)
    assert all(name in message for name in UNSUPPORTED)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"peft_type": "VERA"}, "peft_type is 'VERA'"),
        ({"r": 5}, "do not fit rank 5"),
        ({"r": "8"}, "r='8' is not a number"),
        ({"lora_alpha": True}, "lora_alpha='True'"),
        ({"use_dora": True}, "magnitude"),
        ({"lora_bias": True}, "has a, b, needs a, b, bias"),
        ({"lora_bias": "yes"}, "neither true nor false"),
        ({"use_dora": "yes"}, "neither true nor false"),
        ({"rank_pattern": {r"(a)\1": 3}}, "not supported"),
        ({"rank_pattern": {"((a?){900}){900}": 3}}, "more complicated"),
        ({"rank_pattern": {"a" * 3000: 3}}, "3000 characters"),
        ({"rank_pattern": {f"(a|b)*{i}": 3 for i in range(60)}}, "more than 50 regular expressions"),
        ({"rank_pattern": {"q_proj": 3.5}}, "not a whole number"),
        ({"alpha_pattern": {"q_proj": 10**400}}, "out of range"),
        ({"alpha_pattern": {"q_proj": "8"}}, "not a number"),
        ({"lora_alpha": 10**400}, "out of range"),
        ({"r": 4.5}, "not a whole number"),
        ({"layers_to_transform": 3.5}, "layers_to_transform=3.5"),
        ({"layers_to_transform": [0, "1"]}, "layers_to_transform=[0, '1']"),
        ({"layers_to_transform": [[1]]}, "layers_to_transform"),
        ({"layers_to_transform": True}, "layers_to_transform"),
        ({"layers_to_transform": -1}, "layers_to_transform"),
        ({"target_modules": r".*\.(q|k|v)_proj"}, "k_proj"),
        ({"target_modules": "("}, "target_modules: '(' is not a regular expression"),
        ({"exclude_modules": "("}, "exclude_modules: '(' is not a regular expression"),
        ({"exclude_modules": 5}, "exclude_modules"),
        ({"rank_pattern": {"(": 3}}, "not a regular expression"),
        ({"rank_pattern": ["q"]}, "rank_pattern"),
        ({"modules_to_save": 3}, "modules_to_save"),
        ({"target_modules": ["q_proj", "v_proj", "k_proj"]}, "k_proj"),
    ],
)
def test_fields_that_make_no_sense(fields: dict[str, Any], said: str, folder: Path) -> None:
    edit(folder, **fields)
    assert said in refused(folder)


@pytest.mark.parametrize("pattern", [".?" * 24 + "!", ".*" * 20 + "!", "(a+)+$", "(a|a)" * 40 + "!"])
@pytest.mark.parametrize("key", ["rank_pattern", "alpha_pattern", "exclude_modules"])
def test_a_hostile_pattern_that_matches_nothing_takes_no_time(pattern: str, key: str, folder: Path) -> None:
    edit(folder, **{key: pattern if key == "exclude_modules" else {pattern: 3}})
    kit = kitout.attach(ZOO["llama"].build())
    with at_most(300_000):
        kitout.load_peft(kit, folder, "a")


def tensors(change: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        held = load_file(folder / "adapter_model.safetensors")
        change(held)
        save_file(held, folder / "adapter_model.safetensors")

    return apply


Q0 = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (tensors(lambda t: t.pop(f"{Q0}.lora_B.weight")), "has a, needs a, b"),
        (tensors(lambda t: [t.pop(f"{Q0}.lora_{x}.weight") for x in "AB"]), "has no tensors for them"),
        (tensors(lambda t: t.update({f"{Q0}.lora_A.weight": torch.zeros(4, 47)})), "do not fit rank 4 over 48"),
        (tensors(lambda t: t.update({"strange": torch.zeros(1)})), "unexpected key 'strange'"),
        (tensors(lambda t: t.update({f"{Q0}x.lora_A.weight": torch.zeros(1)})), "no module"),
        (tensors(lambda t: t.update({"base_model.model.lm_head.weight": torch.zeros(99, 48)})), "modules_to_save"),
        (tensors(lambda t: t.update({"base_model.model.lm_head.weight": torch.zeros(120, 48)})), "resized"),
        (tensors(lambda t: t[f"{Q0}.lora_A.weight"].fill_(torch.nan)), "NaN"),
        (lambda f: (f / "adapter_model.safetensors").rename(f / "adapter_model.bin"), "pickled"),
        (lambda f: (f / "adapter_model.safetensors").unlink(), "holds no adapter_model.safetensors"),
        (lambda f: (f / "adapter_model.safetensors").write_bytes(b"\xff" * 20), "not a safetensors file"),
        (lambda f: (f / "adapter_config.json").write_text("[" * 100_000), "nested too deeply"),
        (lambda f: (f / "adapter_config.json").unlink(), "holds no adapter_config.json"),
    ],
)
def test_tensors_that_do_not_fit(change: Callable[[Path], Any], said: str, folder: Path) -> None:
    change(folder)
    assert said in refused(folder)


def test_a_stored_base_weight_is_accepted_if_it_is_the_same_here(folder: Path) -> None:
    base = ZOO["llama"].build()
    tensors(lambda t: t.update({"base_model.model.lm_head.weight": base.lm_head.weight.detach().clone()}))(folder)
    kitout.load_peft(kitout.attach(base), folder, "a")
