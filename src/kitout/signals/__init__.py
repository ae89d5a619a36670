"""What one pass over data says about the linear sites of a model, before anything is trained."""
