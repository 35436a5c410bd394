"""Selectors: which pages a decode query reads. One file a method."""
