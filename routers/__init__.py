"""Routers by the name that configs and requests use. Adding one: a file, a line here, a test."""

ROUTERS = {
    "always": "routers.baseline:Always",
    "random": "routers.baseline:Random",
    "round_robin": "routers.baseline:RoundRobin",
    "rules": "routers.baseline:Rules",
    "centroid": "routers.centroid:Centroid",
    "task": "routers.learned.router:task",
    "knn": "routers.learned.router:knn",
    "linear": "routers.learned.router:linear",
    "logistic": "routers.learned.router:logistic",
    "factor": "routers.learned.router:factor",
    "cluster": "routers.learned.router:cluster",
    "gaussian": "routers.learned.router:gaussian",
    "mlp": "routers.learned.router:mlp",
    "choice": "routers.learned.router:choice",
    "threshold": "routers.learned.router:threshold",
    "stack": "routers.learned.router:stack",
    "panel": "routers.learned.router:panel",
}
