"""Rewards: which of several answers is the best one, said by small models on frozen features.

``load_reward`` is all that aggregators need. Read in this order: features.py and inputs.py (what a reward sees),
armorm.py and dmoerm.py (the models), build.py (how they are fitted), reward.py (how they are served).
"""

from orchestrator.aggregators.reward_moe.reward import load_reward

__all__ = ["load_reward"]
