"""docs/gates.md from the registry: ``python -m collegium_kernels.gates.table > docs/gates.md``."""

import sys

from collegium_kernels.gates import GATES, OTHERS, card

HEAD = """# Gates

Generated from the registry by `python -m collegium_kernels.gates.table > docs/gates.md`; a test compares.
T tokens, D width, E experts, k experts a token, and F, N, M, R, Q, S, A, C, H, K as in the gate's own file. The cost is
in multiplications a token beside the experts'. "Batch dependent" means that tokens of other requests, or later ones,
may change what a token gets. Where it says no, not one bit changes; in attention (MoA, MoBA) the last bits may, with
the length of the sequence.

| name | gate | kind | source | experts a token | batch dependent | cost |
|---|---|---|---|---|---|---|
"""
TAIL = """
`gates.load("top_p")(width, num_experts)` makes a gate with its paper's defaults, for `MoELayer` to call.

## A gate of your own

is a module that turns tokens into a `Routing`: lists of experts of any length, from a matrix (`from_dense`), from a
rectangle with ids that are no experts (`from_topk`), or from one whose k never changes (`rectangular`).

```python
import torch
from collegium_kernels.gates.base import Context, LinearGate, Routed
from collegium_kernels.gates.losses import balance_loss
from collegium_kernels.moe import FusedMoE, MoELayer, SwiGLUExperts
from collegium_kernels.ragged import from_dense


class MinPGate(LinearGate):
    \"""Every expert with at least a share of the best one's probability.\"""

    def __init__(self, width: int, num_experts: int, *, share: float = 0.5) -> None:
        super().__init__(width, num_experts)
        self.share = share

    def forward(self, x_TD: torch.Tensor, context: Context) -> Routed:
        probs_TE = self.logits(x_TD).softmax(dim=1)  # in fp32, and the same bits in any batch
        routing = from_dense(probs_TE, probs_TE >= self.share * probs_TE.amax(dim=1, keepdim=True))
        return Routed(routing=routing, scores_TE=probs_TE, loss=0.01 * balance_loss(probs_TE, routing))


layer, x_TD = MoELayer(MinPGate(64, 8), SwiGLUExperts(8, 64, 32)), torch.randn(5, 64)
y_TD, routed = layer(x_TD)  # with gradients
with torch.no_grad():  # the same experts, served
    moe = FusedMoE(layer.experts.w_gate_up_EGD, layer.experts.w_down_EDF, precision="int8", group=32)
    y_TD = moe(x_TD, layer.gate(x_TD, Context()).routing)
```
"""


def table() -> str:
    rows = []
    for name in (*GATES, *OTHERS):
        c = card(name)
        dependent = "yes" if c.batch_dependent else "no"
        rows.append(f"| `{name}` | {c.title} | {c.kind} | {c.source} | {c.k} | {dependent} | {c.cost} |\n")
    return HEAD + "".join(rows) + TAIL


if __name__ == "__main__":
    sys.stdout.write(table())
