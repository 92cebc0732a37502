"""What to say of a stack that is hardly worth having: fitted on too little, or no better than its best expert."""

from collections.abc import Sequence

import numpy as np

from orchestrator.aggregators.stacking.artefact import Fitted
from orchestrator.aggregators.stacking.recorded import Recorded, usable
from orchestrator.aggregators.stacking.stopping import best_rule
from routers.records import Array

ADVISED = 500
"""Questions, by docs/aggregators-measured.md."""


def doubts(fitted: Fitted, recorded: Recorded, rows: Array) -> Sequence[str]:
    """Sentences, none for a stack without reproach. ``rows`` are the questions that it was fitted on."""
    known, stack = usable(recorded, rows), fitted.stack
    found = []
    if len(unknown := np.setdiff1d(rows, known)):
        found.append(
            f"{len(unknown)} of {len(rows)} questions were left out: their 'answer' is none of their options. The "
            f"first is {recorded.records.question_ids[int(unknown[0])]!r}."
        )
    rows = known
    if len(rows) < ADVISED:
        found.append(
            f"{len(rows)} questions are few for a stack: its weights and when it stops asking are "
            f"guesses. Record {ADVISED} or more, or take a vote, which needs none."
        )
    right_E = (recorded.ballots.votes_QE[rows] == recorded.gold_Q[rows, None]).mean(axis=0)
    best, alone = int(right_E.argmax()), float(right_E.max())
    _, _, held_out = best_rule(stack.curve_XF, fitted.calls)
    if held_out - alone < np.sqrt(alone * (1 - alone) / len(rows)):
        found.append(
            f"On questions held out it is right in {100 * held_out:.1f} %, the best expert alone, "
            f"{fitted.expert_ids[best]}, in {100 * alone:.1f} %: that is no clear gain, and 'first' with that expert "
            "is simpler and costs one call."
        )
    return found
