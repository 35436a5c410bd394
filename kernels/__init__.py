"""Kernels that attend over compressed pages: `reference` is their specification."""
