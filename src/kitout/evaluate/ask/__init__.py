"""Running a model over many prompts: generated answers, label likelihoods."""
