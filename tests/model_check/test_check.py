"""kitout.check holds on models that keep the laws, leaves them as they were, and fails where a fault is planted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kitout
from kitout import IA3, BitFit, Houlsby, Kit, LoRA, PrefixTuning, PromptTuning, fast
from kitout.errors import ConfigError
from kitout.methods.bitfit import ShiftDelta
from kitout.methods.deltas.low_rank import LowRankDelta
from kitout.model_check.result import COLUMNS, ModelCheck
from laws.activate import fresh_model
from zoo import EXTRA, ZOO

LORA = [LoRA(rank=2, targets="all-linear")]


def model_of(species: str) -> nn.Module:
    return fresh_model({**ZOO, **EXTRA}[species])


def outcomes(found: ModelCheck, method: str = "LoRA") -> dict[str, str]:
    return {column: found.cells[method, column].outcome for column in found.columns}


PADDING = {"llama": "right padding and left padding", "roberta": "right padding", "timm-vit": "no padding"}


@pytest.mark.parametrize(("species", "padding"), PADDING.items(), ids=PADDING.keys())
def test_a_model_that_keeps_the_laws(species: str, padding: str) -> None:
    found = kitout.check(model_of(species))
    assert found.ok, str(found)
    assert found.columns == list(COLUMNS)
    has_cache = species == "llama"
    assert outcomes(found) == dict.fromkeys(COLUMNS, "ok") | ({} if has_cache else {"cache": "not applicable"})
    assert {"IA3", "BitFit", "Houlsby", "ParallelAdapter", "PrefixTuning"} < set(found.methods)
    assert ("VPT" in found.methods) != ("PromptTuning" in found.methods)
    assert found.cells["Houlsby", "merge"].outcome == "not applicable"
    assert found.notes[0] == f"rows: compared with {padding}", "what pools token 0 means nothing with left padding"
    measured = found.cells["LoRA", "rows"]
    assert measured.difference is not None
    assert measured.difference <= (measured.allowed or 0.0) < 1e-3


def test_an_encoder_decoder_is_compared_by_generate() -> None:
    found = kitout.check(model_of("t5"), [PromptTuning(length=2)], columns=["rows", "cache"])
    assert outcomes(found, "PromptTuning") == {"rows": "ok", "cache": "ok"}
    assert found.notes[-1] == "cache: compared by generate"


def test_freezing_alone_may_change_a_product_and_is_not_held_against_a_method() -> None:
    """torch folds x [B, T, D] into one product or not, by whether the matrix requires a gradient."""
    model = model_of("bert")
    pooler = model.bert.pooler
    original = pooler.forward
    pooler.forward = lambda x: original(x) + float(pooler.dense.weight.requires_grad)
    assert kitout.check(model, LORA, columns=["effect"]).ok


def test_the_table_names_methods_refusals_and_what_was_compared() -> None:
    lines: list[tuple[str, str, str]] = []
    found = kitout.check(
        model_of("mixtral"),
        [LoRA(rank=2), LoRA(rank=3, dora=True), IA3()],
        columns=["merge", "effect"],
        on_cell=lambda method, column, cell: lines.append((method, column, cell.outcome)),
    )
    assert found.methods == ["LoRA(rank=2)", "LoRA(rank=3, dora=True)", "IA3"]
    assert found.columns == ["effect", "merge"]
    assert lines == [(m, c, cell.outcome) for (m, c), cell in found.cells.items()]
    refused = found.cells["IA3", "effect"]
    assert refused.outcome == "refused"
    assert found.cells["IA3", "merge"].outcome == "not applicable"
    assert found.ok, "a refusal is no failure"
    page = str(found)
    assert page.startswith("MixtralForCausalLM\n  method ")
    assert f"IA3, effect: refused: {refused.message[:40]}" in page
    assert "rows: compared with right padding and left padding" in page
    assert "cache: compared by generate, token by token" in page


def test_the_model_is_left_as_it_was() -> None:
    model = model_of("llama").train()
    model.model.layers[0].eval()
    for parameter in model.model.embed_tokens.parameters():
        parameter.requires_grad_(False)
    weight = model.lm_head.weight
    weight.grad = torch.ones_like(weight)
    model.model.kept_of_a_forward = None
    bits = {name: value.clone() for name, value in model.state_dict().items()}
    classes = [type(m) for m in model.modules()]
    attributes = [list(vars(m)) for m in model.modules()]
    modes = [m.training for m in model.modules()]
    trained = [p.requires_grad for p in model.parameters()]
    state = torch.get_rng_state()
    assert kitout.check(model, LORA).ok
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, bits[name]) for name, value in model.state_dict().items())
    assert [type(m) for m in model.modules()] == classes
    assert [list(vars(m)) for m in model.modules()] == attributes
    assert [m.training for m in model.modules()] == modes
    assert [p.requires_grad for p in model.parameters()] == trained
    assert weight.grad is not None
    assert [p for p in model.parameters() if p.grad is not None] == [weight]


def test_a_state_that_a_module_keeps_of_a_forward_is_put_back() -> None:
    model = model_of("bert")

    class Keeping(nn.Linear):
        seen: Tensor | None

        def forward(self, x: Tensor) -> Tensor:
            self.seen = super().forward(x)
            return self.seen

    layer = model.bert.encoder.layer[0].output.dense
    layer.__class__ = Keeping
    layer.seen = None
    assert kitout.check(model, LORA, columns=["effect", "save"]).ok
    assert layer.seen is None


def test_the_same_check_twice_gives_the_same_numbers() -> None:
    first, second = (kitout.check(model_of("gpt2"), LORA, seed=3) for _ in range(2))
    assert first == second


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=["float64", "bfloat16"])
def test_what_rounding_may_differ_by_follows_the_dtype(dtype: torch.dtype) -> None:
    found = kitout.check(model_of("llama").to(dtype), [*LORA, Houlsby(width=4), PrefixTuning(length=3)])
    assert found.ok, str(found)
    allowed = found.cells["LoRA", "merge"].allowed
    assert allowed is not None
    assert allowed < 1e-6 if dtype == torch.float64 else allowed > 1e-3


# ---- it can fail ---------------------------------------------------------------------------------------------------


def patched(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, change: Callable[..., Any]) -> None:
    """change(original, *args) in place of a method."""
    original = getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *args, **kwargs: change(original, *args, **kwargs))


def test_a_delta_that_ignores_rows_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    original = LowRankDelta.forward_rows.__func__  # type: ignore[attr-defined]

    def first_row_for_all(cls: Any, deltas: Any, rows: list[int], x: Tensor, y: Tensor, cache: Any) -> Any:
        return original(cls, deltas, [rows[0]] * len(rows), x, y, cache)

    monkeypatch.setattr(LowRankDelta, "forward_rows", classmethod(first_row_for_all))
    found = kitout.check(model_of("llama"), LORA)
    assert not found.ok
    assert outcomes(found) == {"effect": "ok", "rows": "wrong", "merge": "ok", "save": "ok", "cache": "ok"}
    assert "row 1 (base, right padding), logits differs by " in str(found)


def test_a_gradient_that_forgets_a_row_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    def without_gradient(original: Any, deltas: Any, rows: Any, x: Tensor, y: Tensor) -> Any:
        result = original(deltas, rows, x, y)
        return (
            None
            if result is None
            else result[:1].detach().new_tensor(0.0) + torch.cat((result[:1].detach(), result[1:]))
        )

    monkeypatch.setattr(LowRankDelta, "fused_rows", classmethod(lambda *_: None))  # faster
    patched(monkeypatch, kitout.methods.deltas.low_rank, "_add_trained_rows", without_gradient)
    assert outcomes(kitout.check(model_of("llama"), LORA, columns=["effect", "rows"])) == {
        "effect": "ok",
        "rows": "wrong",
    }


def test_an_inexact_merge_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    patched(
        monkeypatch, LowRankDelta, "fold", lambda original, self, w, b: (w + 0.99 * (original(self, w, b)[0] - w), b)
    )
    found = kitout.check(model_of("bert"), LORA)
    assert outcomes(found)["merge"] == "wrong"
    assert (found.cells["LoRA", "merge"].difference or 0.0) > 1e-4


def test_values_lost_in_a_file_are_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    def off_by_a_bit(original: Any, *args: Any, **kwargs: Any) -> Any:
        adapter = original(*args, **kwargs)
        with torch.no_grad():
            next(adapter.parameters()).flatten()[0] += 1e-6
        return adapter

    patched(monkeypatch, Kit, "load", off_by_a_bit)
    assert outcomes(kitout.check(model_of("vit"), LORA))["save"] == "wrong"


def test_what_sees_other_positions_is_wrong_with_a_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    def with_mean(original: Any, delta: LowRankDelta, x: Tensor, y: Tensor, *rest: Any, **more: Any) -> Tensor:
        return original(delta, x, y, *rest, **more) + x.mean()

    patched(monkeypatch, LowRankDelta, "add_change", with_mean)
    found = kitout.check(model_of("llama"), LORA, columns=["cache"])
    assert outcomes(found) == {"cache": "wrong"}


CHANGES = {  # of what a LoRA adds -> what its cell says
    "the adapter changes nothing in the output": lambda original, delta, x, y, *rest, **more: y,
    "the output is not finite": lambda original, delta, x, y, *rest, **more: y + delta.a.sum() * float("nan"),
    "no gradient, although the output depends on them": lambda original, *args, **more: original(
        *args, **more
    ).detach(),
}


@pytest.mark.parametrize(("message", "change"), CHANGES.items(), ids=["nothing", "nan", "cut"])
def test_an_effect_that_is_none(monkeypatch: pytest.MonkeyPatch, change: Any, message: str) -> None:
    patched(monkeypatch, LowRankDelta, "add_change", change)
    monkeypatch.setattr(LowRankDelta, "fused_linear", lambda *args: None)
    found = kitout.check(model_of("bert"), LORA, columns=["effect"])
    assert outcomes(found) == {"effect": "wrong"}
    assert message in found.cells["LoRA", "effect"].message


def test_a_site_where_nothing_is_applied_is_wrong_and_a_shift_of_keys_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    found = kitout.check(model_of("bert"), [BitFit()], columns=["effect"])
    cell = found.cells["BitFit", "effect"]
    assert cell.outcome == "ok"
    assert "key.shift" in cell.message
    assert "by the base's own computation" in cell.message
    dead = "bert/encoder/layer/1/output/dense"
    patched(
        monkeypatch,
        ShiftDelta,
        "forward",
        lambda original, self, x, y, frozen=None: y if self is skipped[0] else original(self, x, y),
    )
    skipped: list[Any] = [None]

    def keep_dead(original: Any, kit: Kit, name: str, *args: Any, **kwargs: Any) -> Any:
        adapter = original(kit, name, *args, **kwargs)
        skipped[0] = adapter.deltas[dead] if skipped[0] is None else skipped[0]
        return adapter

    patched(monkeypatch, Kit, "add", keep_dead)
    with fast.disabled():  # the patched forward is the plain form
        cell = kitout.check(model_of("bert"), [BitFit()], columns=["effect"]).cells["BitFit", "effect"]
    assert cell.outcome == "wrong"
    assert f"applied nowhere at {dead.replace('/', '.')}" in cell.message


def test_an_output_that_a_call_before_changes_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def counting(original: Any, *args: Any, **more: Any) -> Tensor:
        calls.append(len(calls))
        return original(*args, **more) + 1e-3 * len(calls)

    patched(monkeypatch, LowRankDelta, "add_change", counting)
    cell = kitout.check(model_of("bert"), LORA, columns=["effect"]).cells["LoRA", "effect"]
    assert cell.outcome == "wrong"
    assert cell.message.startswith("the same call, after one of the base, differs by")


def test_any_other_exception_is_an_error_with_its_type_and_place(monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(original: Any, *args: Any) -> Any:
        raise IndexError("planted")

    patched(monkeypatch, LowRankDelta, "fold", crash)
    found = kitout.check(model_of("bert"), LORA, columns=["effect", "merge"])
    assert not found.ok
    assert outcomes(found) == {"effect": "ok", "merge": "error"}
    message = found.cells["LoRA", "merge"].message
    assert message.startswith("IndexError: planted (test_check.py:")
    assert "from module_adapter.py:" in message


# ---- the base --------------------------------------------------------------------------------------------------------


def test_rows_that_the_base_itself_mixes_are_not_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("bert")
    original = model.bert.pooler.forward
    model.bert.pooler.forward = lambda x: original(x) + x.mean((0, 1))
    found = kitout.check(model, LORA, columns=["effect", "rows"])
    assert outcomes(found) == {"effect": "ok", "rows": "not applicable"}
    assert "rows: the base's own rows depend on each other: a row alone differs by" in str(found)


def test_special_tokens_are_not_generated(monkeypatch: pytest.MonkeyPatch) -> None:
    """A random model may choose the id that stands for an image, and is then asked for one."""
    model = model_of("llama")
    model.config.image_token_id = 42
    with torch.no_grad():  # the likeliest token of all
        model.lm_head = nn.Linear(48, model.config.vocab_size)
        model.lm_head.bias[42] = 1e3
    seen: list[Tensor] = []
    model.register_forward_pre_hook(lambda m, a, k: seen.append(k["input_ids"]), with_kwargs=True)
    assert kitout.check(model, LORA, columns=["cache"]).ok
    assert any(ids.shape[1] > 6 for ids in seen)
    assert not any((ids[:, 6:] == 42).any() for ids in seen)


def test_a_base_that_does_not_run_is_refused_with_what_to_write() -> None:
    model = model_of("bert")
    model.bert.pooler.forward = lambda x: x[:, 1000]
    with pytest.raises(
        ConfigError, match="the base itself does not run on the made-up batch, give a batch as the model"
    ):
        kitout.check(model)
    model.bert.pooler.forward = lambda x: x[:, 0] * float("nan")
    with pytest.raises(ConfigError, match="gives no finite output"):
        kitout.check(model)


def test_an_example_batch_takes_the_place_of_a_made_up_one() -> None:
    seen: list[tuple[int, ...]] = []
    model = model_of("roberta")
    model.register_forward_pre_hook(lambda m, a, k: seen.append(tuple(k["input_ids"].shape)), with_kwargs=True)
    found = kitout.check(model, LORA, example_batch={"input_ids": torch.arange(5, 14)[None]})
    assert found.ok, str(found)
    assert {shape[1] for shape in seen} == {9, 11}, "a made-up batch was run"  # 11: with two columns of padding
    assert {shape[0] for shape in seen} >= {1, 3}, "one row is repeated"
    assert len(model._forward_pre_hooks) == 1


def test_what_cannot_be_checked() -> None:
    model = model_of("bert")
    with pytest.raises(ConfigError, match="columns are effect, rows, merge, save, cache; found speed"):
        kitout.check(model, columns=["speed"])  # type: ignore[list-item]
    kit = kitout.attach(model)
    for found in (model, kit):
        with pytest.raises(ConfigError, match="takes a model without a kit"):
            kitout.check(found)


def test_prompts_and_prefixes_have_rows_of_other_lengths() -> None:
    lengths: list[int] = []

    def note(original: Any, kit: Kit, name: str, method: Any, **kwargs: Any) -> Any:
        lengths.append(method.length)
        return original(kit, name, method, **kwargs)

    with pytest.MonkeyPatch.context() as monkeypatch:
        patched(monkeypatch, Kit, "add", note)
        assert kitout.check(model_of("gpt2"), [PromptTuning(length=2), PrefixTuning(length=5)], columns=["rows"]).ok
    assert lengths == [2, 3, 5, 6]
