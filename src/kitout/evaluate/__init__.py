"""Evaluation: generated answers, metrics with confidence intervals, base vs. fine-tuned, reports.

`ask` runs a model over prompts. `metrics` scores its predictions by example, so that every metric has an interval and
two models can be compared on the same examples (`compare`). `report` writes the page, the model card and the plots.
Nothing here trains, and no logits are kept for more than one batch.
"""
