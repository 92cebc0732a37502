"""make bench-routing: the routing benchmark on every pool of a folder, and on each named subset of its experts.

Subsets are read from subsets.json beside the folder of pools: {pool: {name: [expert ids]}}.
"""

from pathlib import Path
from typing import Annotated

import orjson
import typer

from evals.routing.command import routing
from experts.errors import ConfigError


def suite(
    pools: Annotated[Path, typer.Option(envvar="COLLEGIUM_POOLS", help="Folder of recorded pools.")],
    out: Annotated[Path, typer.Option(help="Folder for the reports, one folder each.")] = Path("routing-report"),
    router: Annotated[str, typer.Option(help="Routers, comma-separated, or 'all'.")] = "all",
    encoder: Annotated[str, typer.Option(help="Encoder: its name or a folder.")] = "all-minilm-l6-v2",
) -> None:
    """One call, and at most three with a plain weighted vote where answers can be voted on."""
    for name, pool, experts in cases(pools):
        routing(
            pool=pool,
            router=router,
            experts=experts,
            top_k="1,2,3" if experts else "1",
            out=out / name,
            encoder=encoder,
        )


def cases(pools: Path) -> list[tuple[str, Path, str | None]]:
    """(report, pool, its experts with commas between): the subsets of a pool that has some, else the whole pool."""
    folders = sorted(path.parent for path in pools.glob("*/pool.json"))
    if not folders:
        raise ConfigError(f"No recorded pool in {pools}; COLLEGIUM_POOLS names the folder that holds them.")
    listed = pools.parent / "subsets.json"
    subsets = orjson.loads(listed.read_bytes()) if listed.is_file() else {}
    found: list[tuple[str, Path, str | None]] = []
    for folder in folders:
        own = subsets.get(folder.name, {})
        found += [(f"{folder.name}-{name}", folder, ",".join(experts)) for name, experts in own.items()]
        if not own:
            found.append((folder.name, folder, None))
    return found


if __name__ == "__main__":
    typer.run(suite)
