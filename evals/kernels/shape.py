"""The sizes of a layer of experts. Legend: D width, E experts, F expert width."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A model's layer of experts."""

    name: str
    E: int
    F: int
    D: int
    k: int

    @property
    def numbers(self) -> int:
        """Weights of one expert."""
        return 3 * self.D * self.F
