"""Sparse convolutions against torch's dense ones, on full grids and on grids with holes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from ssmamba_models.slide.batch_norm import RowBatchNorm
from ssmamba_models.slide.sparse_conv import SparseConv, around, halve, merge_tiles

pytestmark = pytest.mark.usefixtures("one_thread")


def random_cells(count: int, side: int, seed: int) -> torch.Tensor:
    """(1, count, 2) different cells of a square."""
    order = torch.randperm(side**2, generator=torch.Generator().manual_seed(seed))[:count]
    return torch.stack((order % side, order // side), -1)[None]


def dense(x, places, left: int, size: int) -> torch.Tensor:
    """(1, C, size, size) of one slide's sites, whose smallest cell on both axes is `left`; 0 elsewhere."""
    image = x.new_zeros(1, x.shape[1], size, size)
    image[0, :, places[:, 2] - left, places[:, 1] - left] = x.T
    return image


def kernel(conv: SparseConv) -> torch.Tensor:
    return conv.weight.permute(2, 1, 0).reshape(conv.weight.shape[2], conv.weight.shape[1], 3, 3)


def sparse_case(count: int, side: int, seed: int, channels: int = 4):
    torch.manual_seed(seed)
    x, sites = merge_tiles(torch.randn(1, count, channels, dtype=torch.float64), random_cells(count, side, seed))
    return x, sites, SparseConv(channels, 3, dtype=torch.float64)


@settings(deadline=None, max_examples=25)
@given(side=st.integers(1, 7), share=st.floats(0.05, 1), seed=st.integers(0, 99))
def test_stride_two_is_a_dense_convolution_wherever_it_sees_a_tile(side, share, seed):
    count = max(1, round(share * side**2))
    x, sites, conv = sparse_case(count, side, seed)
    outputs, pairs = halve(sites)
    size = side + 1  # enough to the right and the bottom, too
    image = F.pad(dense(x, sites.places, 0, size), (2, 2, 2, 2))
    seen = F.max_pool2d(F.pad(dense(torch.ones_like(x[:, :1]), sites.places, 0, size), (2, 2, 2, 2)), 3, 2)
    wanted = F.conv2d(image, kernel(conv), stride=2)
    places = (seen[0, 0] > 0).nonzero().flip(1) - 1
    assert {tuple(place) for place in places.tolist()} == {tuple(place[1:]) for place in outputs.places.tolist()}
    at = outputs.places[:, 2] + 1, outputs.places[:, 1] + 1
    torch.testing.assert_close(conv(x, pairs), wanted[0][:, at[0], at[1]].T)
    torch.testing.assert_close(pairs.average(x), F.avg_pool2d(image, 3, 2)[0][:, at[0], at[1]].T)


@settings(deadline=None, max_examples=25)
@given(side=st.integers(1, 7), share=st.floats(0.05, 1), seed=st.integers(0, 99))
def test_a_submanifold_convolution_is_dense_with_zeros_for_missing_cells(side, share, seed):
    x, sites, conv = sparse_case(max(1, round(share * side**2)), side, seed)
    wanted = F.conv2d(dense(x, sites.places, 0, side), kernel(conv), padding=1)
    torch.testing.assert_close(conv(x, around(sites)), wanted[0][:, sites.places[:, 2], sites.places[:, 1]].T)


def test_slides_of_a_batch_do_not_see_each_other():
    torch.manual_seed(0)
    conv = SparseConv(4, 3)
    cells = torch.cat([random_cells(9, 4, seed) for seed in range(3)])
    features = torch.randn(3, 9, 4)
    x, sites = merge_tiles(features, cells)
    outputs, pairs = halve(sites)
    together, near = conv(x, pairs), around(outputs)
    for slide in range(3):
        alone, own = merge_tiles(features[slide : slide + 1], cells[slide : slide + 1])
        own_outputs, own_pairs = halve(own)
        here = outputs.places[:, 0] == slide
        torch.testing.assert_close(outputs.places[here, 1:], own_outputs.places[:, 1:])
        torch.testing.assert_close(together[here], conv(alone, own_pairs))
        mine = [len(source) for source in around(own_outputs).sources]
        assert mine == [int(here[source].sum()) for source in near.sources]


def test_tiles_in_one_cell_are_averaged_and_padding_is_left_out():
    features = torch.tensor([[[1.0], [3.0], [8.0], [7.0]], [[5.0], [1.0], [2.0], [100.0]]])
    cells = torch.tensor([[[2, 1], [2, 1], [0, 0], [2, 1]], [[4, 4], [0, 9], [4, 4], [4, 4]]])
    mask = torch.tensor([[True, True, True, True], [True, True, True, False]])
    x, sites = merge_tiles(features, cells, mask)
    assert sites.places.tolist() == [[0, 0, 0], [0, 2, 1], [1, 4, 4], [1, 0, 9]]
    assert sites.counts.tolist() == [2, 2]
    torch.testing.assert_close(x, torch.tensor([[8.0], [11 / 3], [3.5], [1.0]]))
    torch.testing.assert_close(sites.mean(x), torch.tensor([[(8 + 11 / 3) / 2], [2.25]]))


def test_pixels_instead_of_tiles_are_refused():
    with pytest.raises(ValueError, match="grid is in tiles: coords / patch_size_level0"):
        merge_tiles(torch.ones(1, 2, 3), torch.tensor([[[0, 0], [2**24, 0]]]))


def test_batch_norm_is_that_of_torch():
    torch.manual_seed(0)
    ours, theirs = RowBatchNorm(5).double(), torch.nn.BatchNorm1d(5).double()
    for training in (True, True, False):
        ours.train(training), theirs.train(training)
        x = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
        y = x.detach().clone().requires_grad_()
        found, wanted = ours(x), theirs(y)
        torch.testing.assert_close(found, wanted)
        found.square().mul(torch.arange(5)).sum().backward()
        wanted.square().mul(torch.arange(5)).sum().backward()
        torch.testing.assert_close(x.grad, y.grad)
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict())


def test_batch_norm_of_a_single_row_is_its_bias():
    norm = RowBatchNorm(3)
    torch.nn.init.constant_(norm.bias, 2.0)
    torch.testing.assert_close(norm(torch.randn(1, 3)), torch.full((1, 3), 2.0))
    assert norm.running_var.isfinite().all()
