"""Quantizers: the bytes of a page. One file a method, over shared bases and grids."""
