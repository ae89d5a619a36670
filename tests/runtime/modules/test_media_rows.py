"""Towers that see images or sounds beside a text: dealt to rows where each row has as many alike, refused elsewhere.

The kinds of tower are those of `tiny_multimodal.py`. Today's silent fault was an adapter on another row's image.
"""

from __future__ import annotations

from functools import cache

import pytest
import torch
import transformers

import kitout
from kitout import SSF, Kit, LoRA, PrefixTuning, PromptTuning, Stack
from kitout.errors import RouteError
from laws.activate import assert_same, put_on, run
from tiny_multimodal import MULTIMODAL, Multimodal, qwen2_vl_batch
from zoo import image_batch, randomize_model, rows_of, text_batch

multimodal = pytest.mark.parametrize("model", MULTIMODAL.values(), ids=MULTIMODAL.keys())
SEARCH = {"num_beams": 2, "num_return_sequences": 2, "max_new_tokens": 3, "min_new_tokens": 3}


@cache
def kit_with(model: Multimodal) -> Kit:
    """Adapters everywhere ("a", "b"), in the text alone ("text", "words") and in the tower alone ("tower")."""
    example = {"example_batch": model.batch([1, 1])} if model.name == "qwen2-audio" else {}
    kit = kitout.attach(model.build(), **example)
    put_on(kit, LoRA(rank=2, targets="all-linear"), "a")
    put_on(kit, LoRA(rank=3), "b", seed=1)
    linear = [s.path for s in kit.sites("attn.v")]
    of_text = [path for path in linear if path.startswith(model.text_part)]
    put_on(kit, LoRA(rank=2, targets=" ".join(of_text)), "text", seed=2)
    put_on(kit, SSF(targets=" ".join(of_text)), "words", seed=3)
    put_on(kit, LoRA(rank=2, targets=" ".join(p for p in linear if p not in of_text)), "tower", seed=4)
    return kit


def assert_as_alone(kit: Kit, model: Multimodal, counts: list[int], rows: list) -> None:
    batch = model.batch(counts)
    with kit.use(rows):
        together = run(kit, batch)
    for i, entry in enumerate(rows):
        with kit.use(entry):
            alone = run(kit, model.row(batch, counts, i))
        assert_same(together[i : i + 1], alone, what=f"row {i} with {entry}")


@multimodal
def test_rows_with_as_many_images_are_as_alone(model: Multimodal) -> None:
    kit = kit_with(model)
    assert_as_alone(kit, model, [1, 1, 1], ["a", None, "b"])
    assert_as_alone(kit, model, [2, 2], ["b", "a"])


@multimodal
def test_rows_with_other_numbers_of_images_are_refused_in_the_tower_alone(model: Multimodal) -> None:
    kit = kit_with(model)
    for counts in ([2, 0, 1], [1, 2, 1], [0, 1, 2]):
        with kit.use(["a", None, "b"]), pytest.raises(RouteError, match=r"sees images.*rows have"):
            run(kit, model.batch(counts))
    assert_as_alone(kit, model, [1, 2, 1], ["text", None, "words"])
    assert_as_alone(kit, model, [1, 2, 1], [Stack("tower", "text"), "tower", Stack("tower", "words")])
    with kit.use("a"):
        run(kit, model.batch([2, 0, 1]))


def test_images_of_other_sizes_are_refused() -> None:
    model = MULTIMODAL["qwen2-vl"]
    kit = kit_with(model)
    batch = qwen2_vl_batch([1, 1], [(1, 4, 4), (1, 2, 8)])  # as many patches, of another shape
    with kit.use(["a", "b"]), pytest.raises(RouteError, match="image_grid_thw"):
        run(kit, batch)
    with kit.use(["text", "words"]):
        run(kit, batch)


def test_images_beside_embeddings_are_refused() -> None:
    model = MULTIMODAL["llava"]
    kit, batch = kit_with(model), MULTIMODAL["llava"].batch([1, 1])
    batch["inputs_embeds"] = kit.base.get_input_embeddings()(batch.pop("input_ids"))
    with kit.use(["a", "b"]), pytest.raises(RouteError, match="without input_ids"):
        run(kit, batch)


@multimodal
def test_each_row_generates_as_it_would_alone(model: Multimodal) -> None:
    kit, batch, rows = kit_with(model), model.batch([1, 1]), ["a", "b"]
    with kit.use(rows):
        together = kit.generate(**batch, **SEARCH)
    per_row = len(together) // len(rows)
    for i, entry in enumerate(rows):
        with kit.use(entry):
            alone = kit.generate(**model.row(batch, [1, 1], i), **SEARCH)
        assert torch.equal(together[i * per_row : (i + 1) * per_row], alone), f"row {i} with {entry}"
    with kit.use(rows), pytest.raises(RouteError, match="sees images"):
        kit.generate(**model.batch([2, 0]), **SEARCH)


def test_a_tower_with_as_many_tokens_as_the_text_is_no_text() -> None:
    """The sound has sixteen tokens, and so has the example's text: a prompt must not get among the sound."""
    model = MULTIMODAL["qwen2-audio"]
    example = model.batch([1, 1])
    assert example["input_ids"].shape[1] == model.build().config.audio_config.max_source_positions
    kit = kitout.attach(model.build(), example_batch=example)
    put_on(kit, PromptTuning(length=3), "prompt")
    put_on(kit, PrefixTuning(length=3), "prefix", seed=1)
    assert list(kit["prompt"].prompts) == [f"{model.text_part}.layers"]
    assert_as_alone(kit, model, [1, 1], ["prompt", "prefix"])


def test_a_model_that_takes_no_text_alone_has_rows_where_texts_and_images_are_as_many() -> None:
    text = {"vocab_size": 99, "num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32}
    vision = {**text, "image_size": 16, "patch_size": 8, "intermediate_size": 48}
    vision.pop("vocab_size")
    config = transformers.CLIPConfig(
        text_config=text | {"intermediate_size": 48, "max_position_embeddings": 16, "eos_token_id": 2},
        vision_config=vision,
        projection_dim=32,
    )
    kit = kitout.attach(randomize_model(transformers.CLIPModel(config), 0))
    put_on(kit, LoRA(rank=2, targets="all-linear"), "a")
    put_on(kit, LoRA(rank=3), "b", seed=1)
    batch = {**text_batch(3), **{k: v[:, :, :16, :16] for k, v in image_batch(3).items()}}
    rows = ["a", None, "b"]

    @torch.no_grad()
    def both(some: dict[str, torch.Tensor]) -> torch.Tensor:
        output = kit(**some)
        return torch.cat((output.text_embeds, output.image_embeds), 1)

    with kit.use(rows):
        together = both(batch)
        with pytest.raises(RouteError, match="pixel_values has 2 entries for 3 rows"):
            kit(**batch | {"pixel_values": batch["pixel_values"][:2]})
    for i, entry in enumerate(rows):
        with kit.use(entry):
            assert_same(together[i : i + 1], both(rows_of(batch, i)), what=f"row {i} with {entry}")
