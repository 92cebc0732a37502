"""Gates that read the token's id or draw: their own tests."""

import pytest
import torch
from collegium_kernels.gates.base import Context
from collegium_kernels.gates.hashed import HashGate, balanced_table
from collegium_kernels.gates.mask_moe import MaskMoEGate
from collegium_kernels.gates.mowe import WordGate
from collegium_kernels.gates.thor import RandomGate, consistency_loss
from collegium_kernels.moe import MoELayer, SwiGLUExperts
from torch import Tensor

NOTHING = Context()


@pytest.mark.parametrize(("vocab", "bound"), [(1000, 1.08), (10000, 1.01)])
def test_balanced_hash_is_even_on_zipf_frequencies(vocab: int, bound: float) -> None:
    frequency = 1 / torch.arange(1, vocab + 1)
    load = torch.zeros(8).index_add(0, balanced_table(frequency, 8), frequency)
    assert float(load.max() / load.mean()) <= bound
    random = torch.zeros(8).index_add(0, HashGate(4, 8, vocab_size=vocab).table_V, frequency)
    assert float(random.max() / random.mean()) > 1.15


def test_hash_reads_only_the_token_id() -> None:
    gate, ids = HashGate(4, 8, vocab_size=20), torch.arange(20)
    one, two = (gate(torch.randn(20, 4), Context(token_ids_T=ids)).routing.expert_ids_P for _ in range(2))
    assert torch.equal(one, two)


def test_thor_with_identical_experts_has_no_divergence() -> None:
    logits, labels = torch.randn(6, 5), torch.randint(0, 5, (6,))
    alone = torch.nn.functional.cross_entropy(logits, labels)
    torch.testing.assert_close(consistency_loss(logits, logits, labels), 2 * alone)
    assert consistency_loss(logits, logits.flip(1), labels) > consistency_loss(logits, logits.flip(1), labels, alpha=0)


def test_thor_serves_the_mean_of_all_experts_when_asked() -> None:
    gate, x = RandomGate(4, 5, ensemble=True), torch.randn(3, 4)
    torch.testing.assert_close(gate.eval()(x, NOTHING).routing.dense_TE(), torch.full((3, 5), 0.2))
    assert gate.train()(x, NOTHING).routing.num_pairs == 3


def test_thor_draws_different_experts() -> None:
    generator = torch.Generator().manual_seed(0)
    gate = RandomGate(4, 8)
    drawn = {int(gate(torch.randn(1, 4), Context(generator=generator)).routing.expert_ids_P) for _ in range(50)}
    assert len(drawn) == 8


def test_word_experts_are_fixed_and_never_read_a_later_token() -> None:
    gate = WordGate(4, 8, routing_vocab=1 << 16, ngram=2)
    ids = torch.tensor([5, 9, 5, 9, 7, 9])
    words = gate.routing_ids(ids)
    assert words[1] == words[3] != words[5]
    assert len(set(WordGate(4, 8, routing_vocab=1 << 16, ngram=6).routing_ids(ids).tolist())) == 6
    assert torch.equal(gate.routing_ids(ids[:3]), words[:3])
    assert len(set(gate.routing_ids(torch.arange(1000)).tolist())) > 950


def recalled(num_experts: int, ids: Tensor, facts: Tensor, *, steps: int = 60) -> tuple[float, MoELayer]:
    """The share of entities whose fact a layer of word experts gives back after training, and the layer.

    Words are frozen random vectors, too narrow to hold a fact: what is learnt lies in the experts.
    """
    torch.manual_seed(1)
    words_TD, classes_CD = torch.randn(len(ids), 16), torch.randn(int(facts.max()) + 1, 16)
    layer = MoELayer(WordGate(16, num_experts, routing_vocab=len(ids)), SwiGLUExperts(num_experts, 16, 4))
    optimiser = torch.optim.Adam(layer.parameters(), lr=0.03)
    for _ in range(steps):
        y_TD, _ = layer(words_TD, Context(token_ids_T=ids))
        optimiser.zero_grad()
        torch.nn.functional.cross_entropy(y_TD @ classes_CD.t(), facts).backward()
        optimiser.step()
    with torch.no_grad():
        answers = (layer(words_TD, Context(token_ids_T=ids))[0] @ classes_CD.t()).argmax(dim=1)
    return float((answers == facts).float().mean()), layer


def test_word_experts_recall_planted_facts_that_a_layer_of_equal_flops_cannot_hold() -> None:
    ids, facts = torch.arange(256), torch.randint(0, 32, (256,))
    recall, layer = recalled(64, ids, facts)
    dense, _ = recalled(1, ids, facts)
    assert recall >= 0.95
    assert dense <= 0.4
    # A fact lies in its entity's expert alone: without that expert its four entities forget, the others do not.
    x, context = torch.randn(256, 16), Context(token_ids_T=ids)
    with torch.no_grad():
        before, _ = layer(x, context)
        layer.experts.w_down_EDF[7] = 0
        after, _ = layer(x, context)
    assert (before != after).any(dim=1).nonzero().flatten().tolist() == [7, 71, 135, 199]


def test_mask_moe_shows_one_expert_to_rare_words_and_all_to_frequent_ones() -> None:
    rare = torch.arange(20) >= 10
    gate = MaskMoEGate(6, 4, rare_V=rare).eval()
    assert gate.visible_VE.sum(1).tolist() == [4] * 10 + [1] * 10
    same = torch.full((60,), 15)
    assert len(gate(torch.randn(60, 6), Context(token_ids_T=same)).routing.expert_ids_P.unique()) == 1
    assert len(gate(torch.randn(60, 6), Context(token_ids_T=same - 15)).routing.expert_ids_P.unique()) > 1
