"""Runs of these tests draw no plots, unless a test asks for `drawn_plots`."""

from blank_plots import blank_plots, drawn_plots

__all__ = ["blank_plots", "drawn_plots"]
