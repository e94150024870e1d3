"""What a training sees depends on the seed alone."""

import pytest
import torch

from ssmamba_models.data.seeded import GlobalBatches, SeededTiles, collate_seeded, epoch_order, mixed_seed
from ssmamba_models.data.tiles import find_tiles


def views(image, generator):
    return {"mean": torch.rand(2, generator=generator)}


def test_seeds_are_unrelated_and_fit():
    seeds = {mixed_seed(seed, epoch, index) for seed in range(5) for epoch in range(5) for index in range(40)}
    assert len(seeds) == 1000
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_an_order_is_a_permutation_of_its_own():
    orders = [tuple(epoch_order(50, 0, epoch).tolist()) for epoch in range(4)]
    assert len(set(orders)) == 4
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert tuple(epoch_order(50, 0, 2).tolist()) == orders[2]


def test_processes_and_parts_share_each_batch():
    whole = list(GlobalBatches(26, 8, epochs=2, seed=3))
    assert len(whole) == 6
    shares = [list(GlobalBatches(26, 8, 2, 3, process=p, processes=2, accumulate=2)) for p in (0, 1)]
    assert [len(share) for share in shares] == [12, 12]
    for step, batch in enumerate(whole):
        parts = [share[2 * step + micro] for micro in (0, 1) for share in shares]
        assert [pair for part in parts for pair in part] == batch


def test_it_can_start_anywhere():
    whole = GlobalBatches(26, 8, epochs=2, seed=3)
    for start in range(7):
        rest = GlobalBatches(26, 8, epochs=2, seed=3, start=start)
        assert list(rest) == list(whole)[start:]
        assert len(rest) == 6 - start


def test_weights_draw_with_replacement():
    weights = torch.tensor([0.0, 1.0, 3.0])
    order = epoch_order(3, 0, 0, weights)
    assert order.shape == (3,)
    drawn = torch.cat([epoch_order(3, 0, epoch, weights) for epoch in range(400)])
    assert (torch.bincount(drawn, minlength=3) / 1200).tolist() == pytest.approx([0, 0.25, 0.75], abs=0.05)


def test_a_tile_drawn_again_looks_different(labelled_tiles):
    tiles = find_tiles(labelled_tiles)
    weights = torch.tensor([1.0] + [0.0] * (len(tiles) - 1))
    (batch,) = GlobalBatches(len(tiles), len(tiles), 1, 0, weights=weights)
    assert batch == [(0, 0), *((0, 0, again) for again in range(1, len(tiles)))]
    data = SeededTiles(tiles, views, 0)
    drawn = [tuple(data[key].views["mean"].tolist()) for key in batch]
    assert len(set(drawn)) == len(tiles)
    assert [tuple(data[key].views["mean"].tolist()) for key in batch] == drawn


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"count": 7}, "7 tiles are fewer than one batch of 8; use --batch-size 7 or less"),
        ({"count": 1}, "1 tile is fewer"),
        ({"processes": 3}, r"expected a multiple of processes x accumulate = 3 x 1 = 3"),
    ],
)
def test_what_cannot_be_cut(settings, message):
    with pytest.raises(ValueError, match=message):
        GlobalBatches(**{"count": 20, "batch_size": 8, "epochs": 1, "seed": 0, **settings})


class TestTiles:
    @pytest.fixture
    def tiles(self, labelled_tiles):
        return find_tiles(labelled_tiles)

    def test_views_depend_on_epoch_and_tile(self, tiles):
        data = SeededTiles(tiles, views, seed=0)
        seen = {tuple(data[epoch, index].views["mean"].tolist()) for epoch in range(3) for index in range(9)}
        assert len(seen) == 27
        assert torch.equal(data[1, 4].views["mean"], SeededTiles(tiles, views, seed=0)[1, 4].views["mean"])
        assert not torch.equal(data[1, 4].views["mean"], SeededTiles(tiles, views, seed=1)[1, 4].views["mean"])

    def test_labels(self, tiles):
        data = SeededTiles(tiles, lambda image, generator: torch.zeros(3), seed=0, labels=list(range(9)))
        assert collate_seeded([data[0, 8], data[0, 2]]).views["label"].tolist() == [8, 2]

    def test_an_unreadable_tile_is_replaced_by_the_next(self, tmp_path, labelled_tiles):
        for name in "abc":
            (tmp_path / f"{name}.png").write_bytes((labelled_tiles / "solid" / "solid_000.png").read_bytes())
        (tmp_path / "a.png").write_text("no image")
        (tmp_path / "c.png").write_text("no image")
        data = SeededTiles(find_tiles(tmp_path), views, seed=0)
        batch = collate_seeded([data[0, 2], data[0, 1]])
        assert batch.indices == [1, 1]
        assert [index for index, _ in batch.unreadable] == [2, 0]
        assert torch.equal(batch.views["mean"][0], batch.views["mean"][1])

    def test_none_is_readable(self, tmp_path):
        (tmp_path / "a.png").write_text("no image")
        batch = collate_seeded([SeededTiles(find_tiles(tmp_path), views, seed=0)[0, 0]])
        assert batch.views is None
        assert batch.unreadable[0][0] == 0
