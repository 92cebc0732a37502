"""What may be wrong with an installation and a config, and what to do. Adding a check: a function, a line here.

A check gets the Case and yields Findings; it loads nothing and changes nothing.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

from experts.errors import ConfigError
from orchestrator.doctor import configuration, installation
from orchestrator.doctor.case import Case, Finding
from orchestrator.starter import read_config

CHECKS: dict[str, Callable[[Case], Iterator[Finding]]] = {
    "extras": installation.extras,
    "imports": installation.imports,
    "cache": installation.cache,
    "batches": installation.batches,
    "memory": installation.memory,
    "port": installation.port,
    "policies": configuration.policies,
    "encoder": configuration.encoder,
    "models": configuration.models,
    "keys": configuration.keys,
    "endpoints": configuration.endpoints,
}


def examine(path: Path | None, *, host: str, port: int) -> Iterator[Finding]:
    """Every check in turn. A config that cannot be read ends it: the rest depends on it."""
    try:
        config = read_config(path)
    except ConfigError as exc:
        yield Finding(check="config", status="fail", message=exc.message, todo="correct the file")
        return
    source = path or "the embedded default"
    yield Finding(
        check="config", message=f"{source}: {len(config.experts)} experts, {len(config.policies)} policies, no mistakes"
    )
    case = Case(config=config, host=host, port=port)
    for check in CHECKS.values():
        yield from check(case)
