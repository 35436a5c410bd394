"""Which model something was made for."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Fingerprint:
    """A model, told apart from others.

    name: for people. config: digest of what its config says of shapes, positions and vocabulary. weights: digest of
    samples of its matrices; None where they are not available. parameters: of all that it computes with, so also norms,
    biases, active adapters and packed weights; None where it is not known, as of files of the first kvcomp.
    """

    name: str
    config: str
    weights: str | None = None
    parameters: str | None = None

    def same(self, other: Fingerprint) -> bool:
        """Whether the two may be one model: weights and parameters are compared where both are known."""
        if self.config != other.config:
            return False
        pairs = ((self.weights, other.weights), (self.parameters, other.parameters))
        return all(one == two for one, two in pairs if one is not None and two is not None)
