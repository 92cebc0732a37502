"""What a recorded answer cost, in the best unit that a pool knows for all its experts."""

import numpy as np

from routers.records import Array, Records

COSTS = {
    "usd": "USD recorded with each answer",
    "usd_per_mtok": "list price of a million tokens out",
    "params_b x chars": "parameters (billions) x characters written: no prices are known",
    "params_b": "parameters (billions): no prices and no lengths are known",
    "calls": "calls: neither prices nor sizes are known",
}


def costs(records: Records) -> tuple[Array, str]:
    """The best that is known for all experts, unless it calls all of them free; a gap in one expert's rows is filled
    with his mean."""
    prices = np.array([np.nan if e.usd_per_mtok_out is None else e.usd_per_mtok_out for e in records.experts])
    sizes = np.array([np.nan if e.params_b is None else e.params_b for e in records.experts])
    shape = records.scores_QE.shape
    for unit, values in (
        ("usd", records.usd_QE),
        ("usd_per_mtok", np.broadcast_to(prices, shape)),
        ("params_b x chars", sizes * records.chars_QE),
        ("params_b", np.broadcast_to(sizes, shape)),
    ):
        if np.isfinite(values).any(axis=0).all() and np.nanmax(values) > 0:
            means = np.nanmean(np.where(np.isfinite(values), values, np.nan), axis=0)
            return np.where(np.isfinite(values), values, means), unit
    return np.ones(shape), "calls"
