"""Intervals: of proportions, means, ratios and any metric over resamples; quantiles of distributions."""
