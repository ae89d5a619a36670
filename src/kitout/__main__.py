"""`python -m kitout`: the same as the `kitout` command.

It knows nothing but where the command line starts.
"""

from kitout.cli import main

main()
