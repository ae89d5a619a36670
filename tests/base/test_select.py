"""The selection language: what each form of target and of layers selects, and the error when it selects nothing."""

from __future__ import annotations

import random

import pytest
import torch
import transformers as hf
from torch import nn

import kitout
from kitout.base.find.find import find_sites
from kitout.base.select import matches, select
from kitout.base.site import Site
from kitout.base.survey import Survey
from kitout.errors import TargetError
from zoo import ZOO

SMALL = {"hidden_size": 48, "num_hidden_layers": 6, "num_attention_heads": 4, "intermediate_size": 80}


@pytest.fixture(scope="module")
def llama() -> Survey:
    with torch.device("meta"):
        return find_sites(hf.LlamaForCausalLM(hf.LlamaConfig(**SMALL, num_key_value_heads=2)))


@pytest.fixture(scope="module")
def t5() -> Survey:
    config = hf.T5Config(d_model=48, d_kv=12, d_ff=80, num_layers=3, num_decoder_layers=2, num_heads=4)
    with torch.device("meta"):
        return find_sites(hf.T5ForConditionalGeneration(config))


@pytest.fixture(scope="module")
def gpt2() -> Survey:
    with torch.device("meta"):
        return find_sites(hf.GPT2LMHeadModel(hf.GPT2Config(n_embd=48, n_layer=2, n_head=4)))


def selected_paths(survey: Survey, targets: str, layers: str = "all") -> list[str]:
    return [site.path for site in select(survey.sites, targets, layers)]


def last_names(paths: list[str]) -> set[str]:
    return {path.rpartition(".")[2] for path in paths}


def error_text(survey: Survey | list[Site], targets: str, layers: str = "all") -> str:
    sites = survey if isinstance(survey, list) else survey.sites
    with pytest.raises(TargetError) as error:
        select(sites, targets, layers)
    return str(error.value)


# --- targets ---------------------------------------------------------------------------------------------------------


def test_roles_in_model_order_and_once(llama: Survey) -> None:
    paths = selected_paths(llama, "attn.v attn.q attn.q self_attn.q_proj")
    assert paths[:2] == ["model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj"]
    assert len(paths) == len(set(paths)) == 12


def test_wildcard_roles(llama: Survey) -> None:
    assert last_names(selected_paths(llama, "mlp.*")) == {"gate_proj", "up_proj", "down_proj"}
    assert last_names(selected_paths(llama, "attn.*")) == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert last_names(selected_paths(llama, "norm")) == {"input_layernorm", "post_attention_layernorm", "norm"}
    assert selected_paths(llama, "head embed") == ["model.embed_tokens", "lm_head"]
    assert selected_paths(llama, "block", "2") == ["model.layers.2"]


def test_self_and_cross(t5: Survey) -> None:
    assert len(selected_paths(t5, "attn.q")) == 3 + 2 + 2
    assert len(selected_paths(t5, "self.q")) == 3 + 2
    assert {s.role for s in select(t5.sites, "cross.*")} == {"cross.q", "cross.k", "cross.v", "cross.o"}


def test_all_linear_selects_all_linears_of_the_blocks(llama: Survey) -> None:
    sites = select(llama.sites, "all-linear")
    assert len(sites) == 7 * 6
    assert all(isinstance(s.module, nn.Linear) and s.layer is not None for s in sites)
    assert "lm_head" not in [s.path for s in sites]


def test_all_linear_selects_transposed_linears(gpt2: Survey) -> None:
    assert last_names(selected_paths(gpt2, "all-linear")) == {"c_attn", "c_proj", "c_fc"}


def test_paths_and_globs(llama: Survey) -> None:
    assert selected_paths(llama, "model.layers.3.self_attn.q_proj") == ["model.layers.3.self_attn.q_proj"]
    assert (
        selected_paths(llama, "q_proj")
        == selected_paths(llama, "model.layers.*.self_attn.q_proj")
        == selected_paths(llama, "*.q_proj")
    )
    assert selected_paths(llama, "self_attn.q_proj") == selected_paths(llama, "attn.q")
    assert selected_paths(llama, "lm_head") == ["lm_head"]
    assert selected_paths(llama, "*_pro?", "0") == selected_paths(llama, "all-linear", "0")


def test_the_end_of_a_path_is_whole_names(llama: Survey) -> None:
    assert "not a role" in error_text(llama, "proj")


def test_wildcard_paths_select_no_blocks_but_a_path_selects_one(llama: Survey) -> None:
    assert "model.layers.1" not in selected_paths(llama, "*")
    assert selected_paths(llama, "model.layers.1") == ["model.layers.1"]


def test_at_the_input(llama: Survey) -> None:
    (site,) = select(llama.sites, "in:mlp.down", "last:1")
    assert (site.port, site.d_in, site.d_out) == ("in", 80, 80)
    sites = select(llama.sites, "in:mlp.down mlp.down", "last:1")
    assert {s.port for s in sites} == {"in", "out"}
    assert len({s.key for s in sites}) == 2


def test_matches_reads_one_word(llama: Survey) -> None:
    site = llama.by_path("model.layers.0.self_attn.q_proj")
    assert matches(site, "attn.q")
    assert matches(site, "q_proj")
    assert matches(site, "all-linear")
    assert not matches(site, "mlp.*")


def test_a_regular_expression_is_on_the_whole_path(llama: Survey) -> None:
    assert selected_paths(llama, r"re:.*\.[13]\..*(q|v)_proj") == selected_paths(llama, "attn.q attn.v", "1,3")
    assert selected_paths(llama, r"re:^(?!.*[.]0[.]).*q_proj", "0-1") == ["model.layers.1.self_attn.q_proj"]
    (site,) = select(llama.sites, r"in:re:model[.]layers[.]5[.].*down_proj")
    assert site.port == "in"
    text = error_text(llama, "re:q_proj re:( re:.{99999999}")
    assert "3 errors" in text
    assert "'re:q_proj' matches no module; a pattern has to match a whole path" in text
    assert "not a regular expression" in text
    assert "more than 50" in error_text(llama, " ".join(["re:.*q_proj"] * 51))


def test_a_regular_expression_without_its_prefix_is_recognized(llama: Survey) -> None:
    assert r"write 're:.*\\.(q|v)_proj'" in error_text(llama, r".*\.(q|v)_proj")
    assert "re:" not in error_text(llama, "(")


# --- exclusions ------------------------------------------------------------------------------------------------------


def test_exclusions(llama: Survey) -> None:
    assert last_names(selected_paths(llama, "all-linear -mlp.*")) == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert last_names(selected_paths(llama, "-attn.* all-linear -gate_proj")) == {"up_proj", "down_proj"}
    assert selected_paths(llama, "all-linear -lm_head") == selected_paths(llama, "all-linear")
    assert selected_paths(llama, "attn.q -*.layers.0.* -re:.*[.]1[.].*", "0-2") == ["model.layers.2.self_attn.q_proj"]
    assert selected_paths(llama, "* -norm -embed -head") == selected_paths(llama, "all-linear")


def test_the_order_of_the_words_never_matters(llama: Survey, gpt2: Survey) -> None:
    for survey, words in (
        (llama, ["in:mlp.down", "mlp.down", "q_proj", "-re:.*[.]0[.].*", "attn.*", "-in:down_proj", "-v_proj"]),
        (llama, ["in:mlp.down", "mlp.down", "in:down_proj"]),
        (gpt2, ["in:attn.qkv", "in:c_attn", "attn.o"]),
    ):
        orders = [random.Random(seed).sample(words, len(words)) for seed in range(30)]
        assert len({tuple(select(survey.sites, " ".join(order))) for order in orders}) == 1


def test_an_exclusion_of_an_input_leaves_the_output(llama: Survey) -> None:
    assert [s.port for s in select(llama.sites, "in:mlp.down mlp.down -in:mlp.down", "0")] == ["out"]
    assert "nothing is left" in error_text(llama, "in:mlp.down mlp.down -down_proj")


def test_exclusions_that_exclude_nothing_are_errors(llama: Survey) -> None:
    text = error_text(llama, "all-linear -qproj -mlp -cross.q")
    assert "3 errors" in text
    assert "did you mean 'q_proj'" in text
    assert "'-mlp.*' means all inside it" in text
    assert "'-cross.q' matches no site" in text
    assert "only exclusions" in error_text(llama, "-lm_head")
    assert "write 'all-linear -lm_head'" in error_text(llama, "-lm_head")
    assert "nothing is left" in error_text(llama, "mlp.gate -mlp.*")


def test_suggestions_are_words_of_this_model(llama: Survey) -> None:
    """A role that the family lacks, or an index, is no help."""
    assert "cross" not in error_text(llama, "cros.q")
    assert "patch" not in error_text(llama, "patc")
    assert "'0" not in error_text(llama, "zzz")


# --- paths of sublayers ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def proven() -> list[Site]:
    """After a probe: the value that a sublayer ends with has the path of its last module."""
    return list(kitout.attach(ZOO["llama"].build()).survey.sites)


def test_a_path_means_the_module_and_not_the_sublayer_that_ends_there(proven: list[Site]) -> None:
    assert {(s.path, s.role) for s in proven if s.path.endswith("o_proj")} > {
        ("model.layers.0.self_attn.o_proj", "sub.attn")
    }
    for word in ("o_proj", "self_attn.o_proj", "model.layers.0.self_attn.o_proj", "re:.*o_proj", "*.o_proj"):
        assert {s.role for s in select(proven, word)} == {"attn.o"}, word
    assert {s.role for s in select(proven, "sub.attn")} == {"sub.attn"}
    usual = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj"
    assert select(proven, usual) == select(proven, "all-linear")
    assert [s.role for s in select(proven, "sub.* -o_proj", "0")] == ["sub.attn", "sub.mlp"]
    assert [s.role for s in select(proven, "sub.* -sub.attn", "0")] == ["sub.mlp"]
    assert [s.layer for s in select(proven, "sub.* -*.layers.0.*")] == [1, 1]
    assert {s.role for s in select(proven, "* -norm -embed -head")} == {s.role for s in select(proven, "all-linear")}


# --- fused projections -----------------------------------------------------------------------------------------------


def with_fused_parts(survey: Survey) -> list[Site]:
    """The sites after a probe: behind each fused projection one site per part."""
    sites: list[Site] = []
    for site in survey.sites:
        sites.append(site)
        if site.role == "attn.qkv":
            third = site.d_out // 3
            sites += [
                site.replace(role=f"attn.{part}", channels=tuple(range(i * third, (i + 1) * third)), d_out=third)
                for i, part in enumerate("qkv")
            ]
    return sites


def test_parts_of_a_fused_projection_only_by_role(gpt2: Survey) -> None:
    sites = with_fused_parts(gpt2)
    parts = select(sites, "attn.v attn.q", "0")
    assert [(s.role, s.d_out, s.channels[0]) for s in parts if s.channels] == [("attn.q", 48, 0), ("attn.v", 48, 96)]
    for word in ("attn.*", "all-linear", "c_attn", "*.c_attn", "attn.qkv"):
        assert all(s.channels is None for s in select(sites, word)), word
    assert [s.role for s in select(sites, "attn.*", "0")] == ["attn.qkv", "attn.o"]


def test_exclusions_of_parts_and_of_the_whole(gpt2: Survey) -> None:
    sites = with_fused_parts(gpt2)
    assert [s.role for s in select(sites, "attn.q attn.v -attn.v", "0")] == ["attn.q"]
    assert [s.role for s in select(sites, "attn.q attn.o -c_attn", "0")] == ["attn.o"]
    assert "'-attn.q' is a part of transformer.h.0.attn.c_attn" in error_text(sites, "attn.* -attn.q")
    assert [s.role for s in select(sites, "attn.* -attn.q -c_attn", "0")] == ["attn.o"]


def test_unknown_channels_name_the_fix(gpt2: Survey) -> None:
    text = error_text(gpt2, "attn.q attn.v")
    assert "2 errors" in text
    assert "fuses its projections (2 x attn.qkv)" in text
    assert "'attn.qkv'" in text
    assert "example_batch=batch" in text


# --- layers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ("all", [0, 1, 2, 3, 4, 5]),
        ("last:2", [4, 5]),
        ("0,3,5", [0, 3, 5]),
        ("2-4", [2, 3, 4]),
        ("0, 2-3", [0, 2, 3]),
        ("layers/last:1", [5]),
        ("0;last:1", [0, 5]),
    ],
)
def test_layers(llama: Survey, layers: str, expected: list[int]) -> None:
    assert [s.layer for s in select(llama.sites, "attn.q", layers)] == expected


def test_layers_count_in_each_tower(t5: Survey) -> None:
    def locations(layers: str) -> list[tuple[str, int | None]]:
        return [(s.tower.split(".")[0], s.layer) for s in select(t5.sites, "self.q", layers)]

    assert locations("last:1") == [("encoder", 2), ("decoder", 1)]
    assert locations("last:3") == [("encoder", 0), ("encoder", 1), ("encoder", 2), ("decoder", 0), ("decoder", 1)]
    assert locations("decoder/last:1") == [("decoder", 1)]
    assert locations("encoder/0;decoder/all") == [("encoder", 0), ("decoder", 0), ("decoder", 1)]
    assert locations("2") == [("encoder", 2)]


def test_sites_outside_the_blocks_only_with_all_layers(llama: Survey) -> None:
    assert "model.norm" not in selected_paths(llama, "norm", "last:6")
    text = error_text(llama, "nonsense lm_head attn.q", "0")
    assert "'lm_head' is outside the blocks" in text
    assert "2 errors" in text


# --- every mistake is an error ---------------------------------------------------------------------------------------


def test_every_term_must_match(llama: Survey) -> None:
    text = error_text(llama, "attn.q mlp.gatee qproj attn.z")
    assert "3 errors" in text
    assert "did you mean 'mlp.gate'" in text
    assert "did you mean 'q_proj'" in text
    assert "attn.q (6)" in text
    assert text.count("'attn.q'") <= 1  # no error for the term that matches


def test_every_layer_must_exist(llama: Survey, t5: Survey) -> None:
    assert "no layer 6; model.layers has 6 (counted from 0)" in error_text(llama, "attn.q", "5-6")
    assert "asks for 7 layers" in error_text(llama, "attn.q", "last:7")
    assert "asks for 0 layers" in error_text(llama, "attn.q", "last:0")
    assert "no layer 2; decoder.block has 2" in error_text(t5, "attn.q", "decoder/2")
    assert "no tower's path contains 'vision'" in error_text(t5, "attn.q", "vision/0")


@pytest.mark.parametrize("layers", ["", "first:2", "3-1", "-1", "a,b", "last:x", "1;;2"])
def test_layers_that_do_not_parse(llama: Survey, layers: str) -> None:
    assert "is not a valid choice of layers" in error_text(llama, "attn.q", layers)


def test_a_term_outside_the_requested_layers(t5: Survey) -> None:
    text = error_text(t5, "cross.q", "encoder/all")
    assert "in none of these layers" in text
    assert "decoder.block: 0,1" in text


def test_a_term_is_checked_even_if_the_layers_are_not_valid(llama: Survey) -> None:
    text = error_text(llama, "nonsense", "9")
    assert "no layer 9" in text
    assert "'nonsense'" in text


def test_commas_and_empty_targets(llama: Survey) -> None:
    assert "separated by spaces, 'attn.q attn.v'" in error_text(llama, "attn.q,attn.v")
    assert "targets is empty" in error_text(llama, "  ")
    assert "no sites" in error_text([], "")
