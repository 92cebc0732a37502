"""The stack: a conditional logit over the options of a question, fitted on recorded answers. See model.py."""
