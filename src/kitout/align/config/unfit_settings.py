"""Settings of `kitout train` that make no sense in a stage, by kind: one table for errors and for --help.

A setting is unfit where its value is not the default. It knows names and reasons, and no stage of a run.
"""

from __future__ import annotations

from kitout.align.config.kinds import KINDS

NO_TEXT = "a stage trains a language model on texts: leave it out"
PAIRS = "the whole answers are compared: leave it out"
NO_WORDS = "a reward adapter has a scalar head and writes no text: leave it out"
READ_WHOLE = "{data} are read whole, so that what a reference says of them is computed once: leave it out"
OF_ALL = {
    "train.from": "what a stage starts from is its own setting: write {at}from={value}",
    **dict.fromkeys(
        ("data.labels", "data.src_lang", "data.tgt_lang", "data.image_size", "data.augment", "train.head",
         "train.trunk", "train.trunk_bytes"),
        NO_TEXT,
    ),
    "train.compile": "rows of answers have too many shapes to compile: leave it out",
    "train.pad_to": "rows of answers are padded to their own length: leave it out",
}  # fmt: skip
OF_ANSWERS = {  # of all but sft
    "data.streaming": READ_WHOLE,
    "data.train_on": PAIRS,
    "train.packing": "an answer is scored in a row of its own: leave it out",
    "train.fsdp": "all roles need the whole base in one process: leave it out",
}
OF_SAMPLING = {
    "data.train_on": "the sampled answers are trained on: leave it out",
    "train.batch_size": "a step takes as many prompts as a rollout: write {at}rollout.prompts={value}",
    "train.seeds": "a round of answers is of one policy: write {at}train.seed, and run the file once more with another "
    "output.folder for each seed",
    "train.group_by_length": "prompts are taken in the order sampled by the seed: leave it out",
    "evaluate.prove_merge": "prompts have no answers to compare: leave it out; `kitout merge` merges the adapter later",
    "evaluate.max_new_tokens": "answers are as long in evaluations as in training: write {at}rollout.max_new_tokens="
    "{value}",
}
OF_SCALAR_HEADS = {
    "evaluate.generate_examples": NO_WORDS,
    "evaluate.max_new_tokens": NO_WORDS,
    "evaluate.forgetting": NO_WORDS,
    "evaluate.prove_merge": "merging keeps the base's own head, not the scalar one: leave it out",
}


def unfit_settings(kind: str) -> dict[str, str]:
    """Dotted name -> why a stage of this kind has no such setting."""
    entry = KINDS[kind]
    unfit = dict(OF_ALL)
    if entry.loss is not None:
        unfit |= OF_ANSWERS
    if entry.takes_reward:
        unfit |= OF_SAMPLING
    if not entry.writes_text:
        unfit |= OF_SCALAR_HEADS
    return unfit


def data_noun(kind: str) -> str:
    """What its data are called in a message."""
    return {"unpaired": "answers", "prompts": "prompts"}.get(KINDS[kind].data_format, "pairs")
