"""kitout.check: does every method do on this model what it promises? The laws, run on demand on one tiny batch."""
