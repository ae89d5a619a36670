"""An answer that is generated in an evaluation ends where answers end in training."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers

import kitout
from kitout.data.encode.generation import CausalEncoder
from kitout.data.examples.convert import one_turn_chat
from kitout.train.measure.predict import generate_answers
from tiny_models import decoder

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }} {{ m['content'] }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant {% endif %}"
)


def test_the_end_of_a_turn_stops_an_answer_where_it_is_not_the_end_of_a_text(tmp_path: Path) -> None:
    decoder(tmp_path / "m")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "m")
    tokenizer.eos_token, tokenizer.chat_template = "</s>", TEMPLATE
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m").eval()
    model.generation_config.eos_token_id = None
    items = CausalEncoder(tokenizer, 64)([one_turn_chat("the cat", "the dog")])
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert items[0].labels[-1] == end
    with torch.no_grad():  # the model writes the end of a turn first, whatever it reads
        model.lm_head.weight.zero_()
        model.lm_head = torch.nn.Linear(model.config.hidden_size, model.config.vocab_size)
        model.lm_head.weight.zero_()
        model.lm_head.bias.zero_()
        model.lm_head.bias[end] = 10.0
        model.lm_head.bias[tokenizer("cat", add_special_tokens=False)["input_ids"][0]] = 5.0
    assert generate_answers(kitout.attach(model), tokenizer, items, 6) == [""]
