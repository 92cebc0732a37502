"""Aggregators by the name that configs and requests use. Adding one: a file, a line here, a test."""

AGGREGATORS = {
    "first": "orchestrator.aggregators.first:First",
    "vote": "orchestrator.aggregators.vote:Vote",
    "stack": "orchestrator.aggregators.stack:Stacked",
    "weighted_vote": "orchestrator.aggregators.vote:WeightedVote",
}
