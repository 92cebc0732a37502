"""Grouping work by engine against loading per question, measured."""
