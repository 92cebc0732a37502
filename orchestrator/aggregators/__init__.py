"""Aggregators by the name that configs and requests use. Adding one: a file, a line here, a test."""

AGGREGATORS = {
    "best_of": "orchestrator.aggregators.best_of:BestOf",
    "debate": "orchestrator.aggregators.debate:Debate",
    "first": "orchestrator.aggregators.first:First",
    "fuse": "orchestrator.aggregators.fuse:Fuse",
    "general_expert": "orchestrator.aggregators.general_expert:GeneralExpert",
    "vote": "orchestrator.aggregators.vote:Vote",
    "weighted_vote": "orchestrator.aggregators.vote:WeightedVote",
}
