"""Calibration: statistics of a model, the files that hold what was fitted to them, and whose they are."""
