"""Learned routers: each predicts, from the question alone, how likely each expert is to answer it well.

A model is a frozen dataclass of arrays and numbers with ``fit`` and ``predict``; saving (artefact.py) and serving
(router.py) are the same for all. Adding one: a file, a line here and in routers/__init__.py, a test.
"""

MODELS = {
    "task": "routers.learned.task:Task",
    "knn": "routers.learned.knn:Knn",
    "linear": "routers.learned.linear:Linear",
    "logistic": "routers.learned.logistic:Logistic",
    "factor": "routers.learned.factor:Factor",
    "cluster": "routers.learned.cluster:Cluster",
    "gaussian": "routers.learned.gaussian:Gaussian",
    "mlp": "routers.learned.mlp:Mlp",
    "choice": "routers.learned.choice:Choice",
    "threshold": "routers.learned.threshold:Threshold",
    "stack": "routers.learned.stack:Stack",
    "panel": "routers.learned.panel:Panel",
    "contrastive": "routers.learned.contrastive:Contrastive",
    "cascade": "routers.learned.cascade:Cascade",
    "value": "routers.learned.value:Value",
    "skills": "routers.learned.skills:Skills",
}

PROBABILITIES = frozenset({"task", "knn", "linear", "logistic", "factor", "cluster", "gaussian", "mlp"})
"""Models whose scores claim to be the probability that the expert answers well, and are held to it."""
