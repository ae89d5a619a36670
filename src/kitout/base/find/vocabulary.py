"""The words by which blocks name their projections: four small vocabularies, and the few that only break ties.

Names decide only what shape and position cannot: which of several equal projections is the query, the key, the value
or all of them in one. Output, up, gate and down follow from widths and containers (`roles_in_block.py`); the words for
them below choose between candidates that are structurally alike. No model or architecture is named here. Source: the
projection names of the transformers and timm model zoos.
"""

from __future__ import annotations

import re

_Q = r"""q | wq | w_q | c_q | to_q | query | queries | query_global | receptance
 | q_?(proj|lin|linear|attn) | qr_proj | q_[ab]_proj
 | (proj|project|lin|linear|fc)_?q(uery)? | query_(proj|projection|layer)"""
_K = r"""k | wk | w_k | c_k | to_k | key | keys | key_global
 | k_?(proj|lin|linear) | (proj|project|lin|linear|fc)_?k(ey)? | key_(proj|projection|layer)"""
_V = r"""v | wv | w_v | c_v | to_v | value | values | value_global
 | v_?(proj|lin|linear) | (proj|project|lin|linear|fc)_?v(alue)? | value_(proj|projection|layer)"""
_FUSED = r"""qkv(_?(proj|linear|layer))? | w_?qkv | to_qkv | (linear|attn|fused|proj)_?qkv | query_key_value
 | c_attn | att_proj | in_proj_qkv\w*
 | kv(_?proj)? | to_kv | linear_kv | key_value | kv_[ab]_proj(_with_mqa)? | query_key | qk(_?proj)?
 | queries_keys_values | keys_values"""

# Looked up in this order: "query_key_value" is a fused projection before it is some kind of value.
PROJECTION_NAMES = {
    part: re.compile(words, re.IGNORECASE | re.VERBOSE)
    for part, words in (("qkv", _FUSED), ("q", _Q), ("k", _K), ("v", _V))
}

# With any prefix ("layout_query"), believed only as a projection's own name, not as that of a module around it.
PREFIXED = re.compile(r"[a-z0-9]+_(?P<part>query|key|value)", re.IGNORECASE)

# Names so general that they are believed only if the widths agree: the output is exactly three times the input.
TRIPLE = re.compile(r"in_proj|attn|attention", re.IGNORECASE)

# Anywhere in the path inside the block: the attention reads keys and values from somewhere else.
CROSS = re.compile(r"cross|encoder_attn|enc_?dec|encoder_decoder|multihead_attn", re.IGNORECASE)

# Tie breakers.
OUTPUT = re.compile(
    r"(to_|c_|w|w_|fc_|attn_|attention_)?(o|out|output|proj|projection|dense)(_?(b_)?(proj|projection|lin|linear|dense|layer))?"
    r"|(linear|lin|proj|fc)_?(o|out)|project_out|post",
    re.IGNORECASE,
)
GATE = re.compile(
    r"gate|gate_?(proj|linear|layer)|(linear|fc\d?|proj|w|linear_fc1)_?gate|w1|wi_0|w_0|fc1_g", re.IGNORECASE
)
DOWN = re.compile(
    r"down|down_?proj|w2|wo|fc2|fc_?out|w_?out|c_proj|linear2|lin2|(output|out)_?(proj|layer)?", re.IGNORECASE
)

# Beside experts: what chooses among them and has another number of outputs.
ROUTER = re.compile(r"router|gating", re.IGNORECASE)

# Outside the blocks.
NOT_TOKENS = re.compile(r"pos|type|segment|time|rel|seg", re.IGNORECASE)
PATCH = re.compile(r"patch(?!_?merg)", re.IGNORECASE)
EMBEDS = re.compile(r"patch|embed", re.IGNORECASE)
HEAD = re.compile(
    r"\w*head\w*|classifier\w*|classification\w*|score|\w*_outputs|logits?\w*|output_projection", re.IGNORECASE
)
