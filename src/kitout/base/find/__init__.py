"""Sites by structure: what one module, one block, one model is, without a forward."""
