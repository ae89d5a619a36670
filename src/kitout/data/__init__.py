"""What is trained and tested on: files of many formats become examples, examples become batches.

Tables of rows (`tables`, `sources`, `stream`, `formats`, `convert`) become examples in words (`examples`), class
folders and arrays images (`readers`, `images`). `split` splits both by what counts as the same (`normalize`). Encoders
(`chat`, `marks`, `encode`, `labels`) make the items (`items`) that a model takes, `padding` a batch of them, `pixels`
and `augment` the pixels. Nothing here knows a kit, a method or a loss, and nothing is unpickled or written.
"""
