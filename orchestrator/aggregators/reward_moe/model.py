"""What a fitted reward is: arrays that score answers with numpy alone, so that serving needs no torch.

Legend: N answers, M parts, D features, W width of the prompt's embedding.
"""

from collections.abc import Mapping
from typing import Protocol

from orchestrator.aggregators.reward_moe.inputs import Inputs
from routers.records import Array


class Model(Protocol):
    """A frozen dataclass of arrays, tuples and numbers; the artefact stores its fields."""

    @property
    def features(self) -> int:
        """D, the features it was fitted on."""

    def score(self, inputs: Inputs) -> tuple[Array, list[Mapping[str, float]]]:
        """The rewards (N), and for each answer what its reward is made of."""


MODELS: Mapping[str, str] = {
    "armorm": "orchestrator.aggregators.reward_moe.armorm:ArmoRM",
    "uniform": "orchestrator.aggregators.reward_moe.armorm:ArmoRM",
    "dmoerm": "orchestrator.aggregators.reward_moe.dmoerm:DMoERM",
    "single": "orchestrator.aggregators.reward_moe.single:Single",
}
