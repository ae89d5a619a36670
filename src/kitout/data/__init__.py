"""What is trained and evaluated on: files of many formats become examples, examples become token ids and pixels.

`read` turns files and hub data sets into rows, `examples` rows into examples, `encode` examples into what a model
takes; `images` turns image sets into pixels. `split` makes train, validation and test by what counts as the same
(`normalize`), `streaming` reads what does not fit into memory, `statistics` counts, `padding` makes rectangles. Nothing
here knows a kit, a method or a loss, and nothing is unpickled or written.
"""
