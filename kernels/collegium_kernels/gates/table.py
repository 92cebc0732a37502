"""docs/gates.md from the registry: ``python -m collegium_kernels.gates.table > docs/gates.md``."""

import sys

from collegium_kernels.gates import GATES, OTHERS, card

HEAD = """# Gates

Generated from the registry by `python -m collegium_kernels.gates.table > docs/gates.md`; a test compares.
T tokens, D width, E experts, k experts a token, and F, N, M, R, Q, S, A, C, H, K as in the gate's own file. The cost is
in multiplications a token beside the experts'. "Batch dependent" means that tokens of other requests, or later ones,
may change what a token gets.

| name | gate | kind | source | experts a token | batch dependent | cost |
|---|---|---|---|---|---|---|
"""


def table() -> str:
    rows = []
    for name in (*GATES, *OTHERS):
        c = card(name)
        dependent = "yes" if c.batch_dependent else "no"
        rows.append(f"| `{name}` | {c.title} | {c.kind} | {c.source} | {c.k} | {dependent} | {c.cost} |\n")
    return HEAD + "".join(rows)


if __name__ == "__main__":
    sys.stdout.write(table())
