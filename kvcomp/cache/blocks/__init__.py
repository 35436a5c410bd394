"""Paging over blocks that an engine owns: plans of steps, records in cells, windows, and the attention of a layer."""
