"""Eviction policies: which tokens enter pages, and which pages leave. One file a method."""
