"""Rewards that are not fitted here: a folder whose reward.json names one, so that it is used like any other.

{"version": 1, "kind": "http", "model": "my-reward", "options": {"base_url": "http://127.0.0.1:9000", "api": "score"}}
{"version": 1, "kind": "vllm", "model": "/models/my-reward", "options": {"max_model_len": 2048}}
"""

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experts.base import Reward
from experts.errors import ConfigError

EXTERNAL: Mapping[str, str] = {
    "http": "experts.reward_http:HttpReward",
    "vllm": "experts.reward_vllm:VllmReward",
    "likelihood": "experts.reward_vllm:VllmLikelihood",
}
_KEYS = {"version", "kind", "model", "options"}


def make_external(about: Mapping[str, Any], folder: Path) -> Reward:
    """Raises ConfigError."""
    if unknown := sorted(set(about) - _KEYS):
        raise ConfigError(f"{folder / 'reward.json'}: unknown key '{unknown[0]}'; known: {', '.join(sorted(_KEYS))}.")
    model, options = about.get("model"), about.get("options", {})
    if not isinstance(model, str) or not model or not isinstance(options, dict):
        raise ConfigError(f"{folder / 'reward.json'}: 'model' is a text and 'options' an object.")
    module, _, attribute = EXTERNAL[about["kind"]].partition(":")
    reward: Reward = getattr(importlib.import_module(module), attribute)(model, options)
    return reward
