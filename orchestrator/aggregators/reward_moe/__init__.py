"""Rewards: which of several answers is the best one, said by small models on frozen features."""
