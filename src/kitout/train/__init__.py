"""How it is learnt: one loop and one objective per file.

`images` teaches an adapter to classify images, `trunk` keeps what is frozen below it, `heads` makes what goes on top;
`checkpoint` and `schedule` are shared. Nothing here knows a file format, a screen or a demo.
"""
