"""Which model something was made for."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Fingerprint:
    """A model, told apart from others.

    name: for people. config: digest of what its config says of shapes, positions and vocabulary. weights: digest of
    samples of its weights; None where they are not at hand.
    """

    name: str
    config: str
    weights: str | None = None

    def same(self, other: Fingerprint) -> bool:
        """Whether the two may be one model: weights are compared where both are known."""
        if self.config != other.config:
            return False
        return self.weights is None or other.weights is None or self.weights == other.weights
