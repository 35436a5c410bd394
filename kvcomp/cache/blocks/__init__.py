"""Paging over blocks that an engine owns: plans of steps, records in cells, windows, and the attention of a layer."""

from .layer import BlockLayer
from .pages import Pages
from .setup import Setup
from .step import Step
from .windows import Windows

__all__ = ["BlockLayer", "Pages", "Setup", "Step", "Windows"]
