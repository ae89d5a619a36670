"""What an adapter did: answers, scores with their intervals, base against tuned, and the pages that tell it.

`generate` and `closed` ask a model; `metrics` scores what it said, example by example, so that every figure has an
interval (`measure`, `interval`) and base and tuned can be compared on the same examples (`compare`); `plots`, `report`
and `card` write it down. Nothing here trains, and no logits are ever held for more than one batch.
"""
