"""What kernels compute, in plain PyTorch: the specification of each operation."""

from .pages import attend_pages

__all__ = ["attend_pages"]
