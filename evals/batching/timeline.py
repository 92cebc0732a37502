"""Engines by time: when each was loading, there, and on its way out."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from evals.batching.simulation import Span

COLOURS = {"loading": "#d1495b", "ready": "#9ecae1", "draining": "#edae49"}


def draw(rows: Mapping[str, tuple[str, Sequence[Span]]], path: Path, *, engines: int, until_s: float) -> None:
    """A PNG with one panel for each scheduler of ``rows``: by name, what its title says and its spans."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.patches import Patch

    figure, panels = plt.subplots(len(rows), 1, figsize=(11, 2.6 * len(rows)), sharex=True, squeeze=False)
    for panel, (name, (told, spans)) in zip(panels[:, 0], rows.items(), strict=True):
        for state, colour in COLOURS.items():
            for engine in range(engines):
                bars = [(s.start_s, s.end_s - s.start_s) for s in spans if s.engine == engine and s.state == state]
                panel.broken_barh(bars, (engine - 0.4, 0.8), facecolors=colour)
        panel.set(xlim=(0, until_s), ylim=(engines - 0.4, -0.6), ylabel="engine", yticks=range(engines))
        panel.set_title(f"{name}: {told}", fontsize=10, loc="left")
    panels[-1, 0].set_xlabel("time, s")
    figure.legend(handles=[Patch(color=c, label=s) for s, c in COLOURS.items()], ncols=3, loc="upper right", fontsize=9)
    figure.tight_layout(rect=(0, 0, 1, 0.97))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
