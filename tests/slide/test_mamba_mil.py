"""MambaMIL: the orders it reads in, that both directions and both orders count, and training with less memory."""

from __future__ import annotations

import pytest
import torch

from ssmamba_models.engine.optimisation import undecayed_names
from ssmamba_models.slide.mamba_mil import BidirectionalMamba, MambaMIL
from ssmamba_models.slide.tile_order import scan_order

pytestmark = pytest.mark.usefixtures("one_thread")


def make(**kwargs) -> MambaMIL:
    torch.manual_seed(0)
    return MambaMIL(6, 2, dim=8, d_state=2, **kwargs)


def test_a_block_is_the_mean_over_orders_and_directions():
    torch.manual_seed(0)
    block = BidirectionalMamba(5, d_state=2)
    x = torch.randn(1, 7, 5)
    orders = [torch.tensor([[0, 1, 2, 3, 4, 5, 6]]), torch.tensor([[3, 6, 0, 2, 5, 1, 4]])]
    want = torch.zeros_like(x)
    for order in orders:
        there = block.norm(x)[:, order[0]]
        read = block.forwards(there) + block.backwards(there.flip(1)).flip(1)
        want[:, order[0]] += read / 4
    torch.testing.assert_close(block(x, orders), x + want)


def test_it_reads_the_tiles_as_they_lie_and_not_as_they_come():
    model = make().eval()
    coords = torch.tensor([[(x, y) for y in range(3) for x in range(4)]]) * 100
    features = torch.randn(1, 12, 6)
    shuffle = torch.randperm(12)
    want, found = model(features, coords), model(features[:, shuffle], coords[:, shuffle])
    torch.testing.assert_close(found["logits"], want["logits"])
    torch.testing.assert_close(found["attention"], want["attention"][:, shuffle])


def test_rows_and_columns_both_count():
    """Turning the slide about its diagonal swaps the two orders, which changes nothing; mirroring it does."""
    model = make().eval()
    coords = torch.tensor([[(x, y) for y in range(3) for x in range(4)]]) * 100
    features = torch.randn(1, 12, 6)
    logits = model(features, coords)["logits"]
    torch.testing.assert_close(model(features, coords.flip(-1))["logits"], logits)
    assert not torch.allclose(model(features)["logits"], logits, atol=1e-5)
    assert not torch.allclose(model(features, coords * torch.tensor([-1, 1]))["logits"], logits, atol=1e-5)


@pytest.mark.parametrize("masked", [False, True])
def test_checkpointing_gives_the_same_gradients(masked):
    coords = torch.randint(0, 5, (2, 15, 2)) * 10
    features = torch.randn(2, 15, 6)
    mask = torch.arange(15)[None] < torch.tensor([[15], [9]]) if masked else None
    gradients = []
    for above in (100, 14):
        model = make(dropout=0.0, checkpoint_above=above).train()
        model.loss(model(features, coords, mask), torch.tensor([0, 1])).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, want in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], want, msg=name)


def test_checkpointing_keeps_less():
    """Counted in the bytes that autograd keeps for the backward pass."""
    kept = []
    for above in (10_000, 100):
        model = make(checkpoint_above=above).train()
        sizes = {}

        def pack(tensor, sizes=sizes):
            sizes[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(torch.randn(1, 500, 6), torch.randint(0, 99, (1, 500, 2)))
        kept.append(sum(sizes.values()))
    assert kept[1] < kept[0] / 2


def test_dtype_and_weight_decay():
    model = make(dtype=torch.float64)
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    assert model(torch.randn(1, 4, 6, dtype=torch.float64))["logits"].dtype == torch.float64
    assert "blocks.1.backwards.A_log" in undecayed_names(model)


def test_scan_order():
    coords = torch.tensor([[(5, 5), (0, 5), (5, 0), (0, 0), (9, 9)]])
    mask = torch.tensor([[True, True, True, True, False]])
    assert scan_order(coords).tolist() == [[3, 2, 1, 0, 4]]
    assert scan_order(coords, transposed=True).tolist() == [[3, 1, 2, 0, 4]]
    assert scan_order(coords, torch.tensor([[True, True, False, True, False]])).tolist() == [[3, 1, 0, 2, 4]]
    assert scan_order(-coords, mask).tolist() == [[0, 1, 2, 3, 4]]
