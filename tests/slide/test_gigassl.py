"""The slide encoders of Giga-SSL: equal to a dense network, and blind to what a slide is not."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from ssmamba_models.slide.slide_encoders import create_slide_encoder

pytestmark = pytest.mark.usefixtures("one_thread")

NAMES = ["gigassl_scm", "gigassl_mlp"]
DIM, WIDTH = 6, 8


def make(name: str = "gigassl_scm", **arguments):
    """In eval mode, with batch statistics as a trained one has them."""
    torch.manual_seed(0)
    encoder = create_slide_encoder(name, DIM, embed_dim=WIDTH, **arguments).eval()
    for key, value in encoder.state_dict().items():
        if key.endswith(("running_mean", "norm.bias")):
            value.normal_(0, 0.3)
        elif key.endswith(("running_var", "norm.weight")):
            value.uniform_(0.5, 2)
    return encoder


def full_grid(columns: int, rows: int) -> torch.Tensor:
    y, x = torch.meshgrid(torch.arange(float(rows)), torch.arange(float(columns)), indexing="ij")
    return torch.stack((x, y), -1).reshape(1, -1, 2)


def slide(tiles: int = 12, seed: int = 0, side: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(1, tiles, DIM, generator=generator)
    return features, torch.randint(side, (1, tiles, 2), generator=generator).float()


@pytest.mark.parametrize(("columns", "rows"), [(1, 1), (4, 3), (5, 5), (2, 7)])
def test_scm_on_a_full_grid_is_a_dense_network(columns, rows):
    encoder = make().double()
    features = torch.randn(1, columns * rows, DIM, dtype=torch.float64)
    image = features.view(1, rows, columns, DIM).permute(0, 3, 1, 2)
    # Two empty cells on the left and top, and as many on the right and bottom as the last windows need.
    image = F.pad(image, (2, 2 - (columns + 1) % 2, 2, 2 - (rows + 1) % 2))

    def conv(layer, x, **how):
        weight = layer.weight.permute(2, 1, 0).reshape(WIDTH, -1, 3, 3)
        return F.conv2d(x, weight, **how)

    def norm(layer, x):
        return F.batch_norm(x, layer.running_mean, layer.running_var, layer.weight, layer.bias, eps=layer.eps)

    first = norm(encoder.norms[0], conv(encoder.down, image, stride=2)).relu()
    first = norm(encoder.norms[1], conv(encoder.convs[0], first, padding=1))
    aside = F.conv2d(F.avg_pool2d(image, 3, 2), encoder.shortcut.weight[:, :, None, None])
    x = (first + norm(encoder.shortcut_norm, aside)).relu()
    y = norm(encoder.norms[2], conv(encoder.convs[1], x, padding=1)).relu()
    x = (norm(encoder.norms[3], conv(encoder.convs[2], y, padding=1)) + x).relu()
    torch.testing.assert_close(encoder(features, full_grid(columns, rows)), x.mean((2, 3)).float())


@pytest.mark.parametrize("name", NAMES)
def test_padding_and_the_rest_of_the_batch_change_nothing(name):
    encoder = make(name)
    (long, places), (short, few) = slide(12), slide(3, seed=1)
    features = torch.cat((F.pad(short, (0, 0, 0, 9), value=float("nan")), long))
    grid = torch.cat((F.pad(few, (0, 0, 0, 9), value=-50.0), places))
    mask = torch.arange(12)[None] < torch.tensor([[3], [12]])
    together = encoder(features, grid, mask)
    torch.testing.assert_close(together[:1], encoder(short, few))
    torch.testing.assert_close(together[1:], encoder(long, places))


@settings(deadline=None, max_examples=20)
@given(shift=st.tuples(st.floats(-300, 300), st.floats(-300, 300)), seed=st.integers(0, 9))
def test_a_shift_by_any_distance_changes_nothing(shift, seed):
    encoder = make()
    features, grid = slide(seed=seed)
    torch.testing.assert_close(encoder(features, grid + torch.tensor(shift)), encoder(features, grid))


def test_scm_sees_where_the_tiles_lie_and_mlp_does_not():
    features, grid = slide()
    for name, differs in (("gigassl_scm", True), ("gigassl_mlp", False)):
        encoder = make(name)
        one, other = encoder(features, grid), encoder(features, grid.flip(1))
        assert (not torch.allclose(one, other)) == differs


@pytest.mark.parametrize("name", NAMES)
def test_the_order_of_the_tiles_does_not_matter(name):
    encoder = make(name)
    features, grid = slide(30, side=3)  # some cells hold several
    order = torch.randperm(30, generator=torch.Generator().manual_seed(5))
    torch.testing.assert_close(encoder(features[:, order], grid[:, order]), encoder(features, grid))


def test_pixels_that_were_rounded_do_not_move_a_tile_to_another_cell():
    encoder = make()
    features, grid = slide()
    side = 56.3
    torch.testing.assert_close(encoder(features, (grid * side).round() / side), encoder(features, grid))


def test_tiles_of_one_cell_count_as_their_mean():
    encoder = make()
    features, grid = slide(2)
    grid = torch.tensor([[[3.0, 4.0], [3.5, 4.9]]])
    torch.testing.assert_close(encoder(features, grid), encoder(features.mean(1, keepdim=True), grid[:, :1]))


@pytest.mark.parametrize("name", NAMES)
def test_gradients_reach_every_parameter_under_bf16_too(name):
    encoder = make(name).train()
    features, grid = slide(40, side=9)
    with torch.autocast("cpu", torch.bfloat16):
        rough = encoder(features, grid)
    exact = encoder(features, grid)
    torch.testing.assert_close(rough, exact, rtol=0.05, atol=0.05)
    (rough * torch.randn(WIDTH)).sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in encoder.parameters())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("training", [True, False])
def test_a_slide_of_one_tile(name, training):
    encoder = make(name).train(training)
    assert encoder(*slide(1)).isfinite().all()


class TestEmbed:
    @pytest.mark.parametrize("name", NAMES)
    def test_it_is_the_mean_of_views_of_length_one(self, name):
        encoder = make(name)
        features, grid = (values[0] for values in slide(20))
        drawn = torch.randint(20, (7, 3), generator=torch.Generator().manual_seed(4))
        wanted = encoder(features[drawn], grid[drawn]).mean(0)
        found = encoder.embed(features, grid, seed=4, views=7, tiles=3)
        torch.testing.assert_close(found, wanted / wanted.norm())
        assert found.dtype == torch.float32

    @pytest.mark.parametrize("name", NAMES)
    def test_with_all_tiles_each_counts_once(self, name):
        encoder = make(name)
        features, grid = slide(20)
        torch.testing.assert_close(
            encoder.embed(features[0], grid[0], tiles="all"), F.normalize(encoder(features, grid)[0], dim=0)
        )

    def test_it_is_seeded_in_eval_mode_and_leaves_the_mode(self):
        encoder = make().train()
        encoder.norms[0].eval()
        features, grid = (values[0] for values in slide(20))
        before = {key: value.clone() for key, value in encoder.state_dict().items()}
        first, again, other = (encoder.embed(features, grid, seed=seed) for seed in (1, 1, 2))
        assert torch.equal(first, again)
        assert not torch.equal(first, other)
        assert encoder.training
        assert encoder.norms[1].training
        assert not encoder.norms[0].training
        torch.testing.assert_close(encoder.state_dict(), before)

    def test_float16_features_and_one_tile(self):
        encoder = make()
        features, grid = (values[0] for values in slide(1))
        found = encoder.embed(features.half(), grid)
        torch.testing.assert_close(found, encoder.embed(features, grid), atol=1e-2, rtol=1e-2)

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ({"views": 0}, "views is 0, expected 1 or more"),
            ({"tiles": 0}, 'tiles is 0, expected 1 or more or "all"'),
            ({"tiles": "some"}, "tiles is 'some'"),
        ],
    )
    def test_options_that_cannot_be(self, options, words):
        features, grid = (values[0] for values in slide(4))
        with pytest.raises(ValueError, match=words):
            make().embed(features, grid, **options)

    @pytest.mark.slow
    def test_100000_tiles_in_bounded_memory(self):
        program = """
import resource, torch
from ssmamba_models.slide import create_slide_encoder
torch.set_num_threads(1)
encoder = create_slide_encoder("gigassl_scm", 64, embed_dim=128)
place = torch.arange(100_000)
grid = torch.stack((place % 400, place // 400), -1).float()
features = torch.randn(100_000, 64)
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
encoder.embed(features[:1000], grid[:1000], tiles="all")
before = peak()
vector = encoder.embed(features, grid, tiles="all")
assert vector.isfinite().all() and abs(float(vector.norm()) - 1) < 1e-5
print(peak() - before)
"""
        run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
        assert run.returncode == 0, run.stderr
        # The features are 25 MiB; of sites there are a quarter of 100,000.
        assert float(run.stdout) < 400


@pytest.mark.parametrize(
    ("features", "grid", "mask", "error", "words"),
    [
        (torch.ones(4, DIM), torch.ones(4, 2), None, ValueError, r"expected \(B, N, 6\)"),
        (torch.ones(1, 4, 5), torch.ones(1, 4, 2), None, ValueError, r"gigassl_scm: features have shape \(1, 4, 5\)"),
        (torch.ones(1, 0, DIM), torch.ones(1, 0, 2), None, ValueError, "a slide without tiles"),
        (torch.ones(1, 4, DIM), None, None, ValueError, "needs where the tiles lie"),
        (torch.ones(1, 4, DIM), torch.ones(1, 3, 2), None, ValueError, r"grid has shape \(1, 3, 2\)"),
        (torch.ones(1, 4, DIM), torch.ones(1, 4, 2), torch.ones(1, 4), TypeError, "mask must be a bool tensor"),
        (torch.ones(1, 4, DIM), torch.ones(1, 4, 2), torch.ones(1, 5).bool(), ValueError, "mask has shape"),
        (torch.ones(1, 4, DIM), torch.ones(1, 4, 2), torch.zeros(1, 4).bool(), ValueError, "a slide without tiles"),
        (torch.ones(1, 4, DIM), torch.full((1, 4, 2), torch.inf), None, ValueError, "is not finite"),
    ],
)
def test_inputs_that_do_not_fit(features, grid, mask, error, words):
    with pytest.raises(error, match=words):
        make()(features, grid, mask)
