"""From a config to model, data, adapters and jobs."""
