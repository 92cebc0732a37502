"""What this package raises on its own account.

KernelError
├── KernelInputError      also a ValueError: an argument is wrong; the message names it, its shape and what is wanted
└── BackendUnavailable    also a RuntimeError: the asked-for backend cannot run here; the message says why
"""

from torch import Tensor


class KernelError(Exception):
    """The root."""


class KernelInputError(KernelError, ValueError):
    """An argument the caller must change."""


class BackendUnavailable(KernelError, RuntimeError):
    """A backend that cannot run here or with these weights."""


def describe(name: str, tensor: Tensor) -> str:
    return f"{name} of shape {tuple(tensor.shape)}, {tensor.dtype} on {tensor.device}"


def require(condition: bool, name: str, tensor: Tensor, wanted: str) -> None:
    """Raise KernelInputError unless ``condition`` holds."""
    if not condition:
        raise KernelInputError(f"{describe(name, tensor)}: {wanted}.")
