"""Routers by the name that configs and requests use. Adding one: a file, a line here, a test."""

ROUTERS = {
    "always": "routers.baseline:Always",
    "random": "routers.baseline:Random",
    "round_robin": "routers.baseline:RoundRobin",
    "rules": "routers.baseline:Rules",
    "centroid": "routers.centroid:Centroid",
}
