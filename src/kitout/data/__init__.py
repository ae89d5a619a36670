"""What is learnt from: files of many formats become examples, examples become batches.

Tables of rows (`tables`), images with labels (`images`, `readers`, `split`) and their way to the pixels a model takes
(`pixels`, `augment`). Nothing here knows a kit, a method or a loss, and nothing is unpickled or written.
"""
