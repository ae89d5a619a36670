"""An adapter in use: `kitout.load(folder)` gives an object that turns new inputs into predictions."""
