"""What is learnt from: files of many formats become examples, examples become batches.

Tables of rows (`tables`) become images with labels (`images`, `readers`, `split`) and the pixels a model takes
(`pixels`, `augment`), or examples in words (`sources`, `stream`, `formats`, `convert`, `examples`, `parts`) and the
items a model takes (`chat`, `marks`, `encode`, `labels`, `items`). Nothing here knows a kit, a method or a loss, and
nothing is unpickled or written.
"""
