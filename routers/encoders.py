"""Text to embedding."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray


class Encoder(Protocol):
    """Embeddings of unit length, float32."""

    name: str
    width: int

    async def encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """``len(texts)`` x ``width``. Raises ConfigError when the model cannot be had."""
