"""PAMA's masked autoencoder and its views: what is hidden, what the loss counts, batches of unequal slides."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ssmamba_models.slide import create_slide_encoder
from ssmamba_models.slide.pama_ssl import PamaPretraining
from ssmamba_models.slide.pama_views import PamaViews
from ssmamba_models.slide.slide_tiles import SlideTiles

pytestmark = pytest.mark.usefixtures("one_thread")

TILES = (40, 1, 2, 17)


def make(**arguments) -> PamaPretraining:
    torch.manual_seed(0)
    encoder = create_slide_encoder("test_pama", 6, **arguments)
    return PamaPretraining(encoder, decoder_dim=8, decoder_depth=2, decoder_heads=2)


def slide(tiles: int, seed: int = 0) -> SlideTiles:
    generator = torch.Generator().manual_seed(seed)
    place = torch.randperm(144, generator=generator)[:tiles]
    grid = torch.stack([place % 12, place // 12], dim=-1).float()
    return SlideTiles(torch.randn(tiles, 6, generator=generator), grid)


def views(seed: int = 0, tiles=TILES) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    draw = PamaViews(max_tiles=30, tiles_per_anchor=8)
    return [draw(slide(count, place), generator) for place, count in enumerate(tiles)]


class TestViews:
    def test_they_depend_on_the_generator_alone(self):
        for one, again, other in zip(views(3), views(3), views(4)):
            assert all(torch.equal(one[name], again[name]) for name in one)
            assert not torch.equal(one["noise"], other["noise"])

    def test_large_slides_are_sampled(self):
        large, small = views()[0], views()[3]
        assert large["features"].shape == (30, 6)
        assert large["distance"].shape == large["polar"].shape == (4, 30)
        whole = slide(40)
        rows = {tuple(row) for row in torch.cat([whole.features, whole.grid], dim=1).tolist()}
        drawn = torch.cat([large["features"], large["grid"]], dim=1).tolist()
        assert len({tuple(row) for row in drawn}) == 30
        assert {tuple(row) for row in drawn} <= rows
        torch.testing.assert_close(small["features"], slide(17, 3).features)

    def test_they_are_of_the_encoder(self):
        encoder = create_slide_encoder("test_pama", 6, max_tiles=7, max_anchors=3, polar_bins=4)
        assert vars(PamaViews.of(encoder)) == {
            "max_tiles": 7,
            "tiles_per_anchor": 8,
            "max_anchors": 3,
            "polar_bins": 4,
        }

        assert PamaViews.of(encoder, max_tiles=5).max_tiles == 5

    def test_batches_are_padded(self):
        parts = views()
        batch = PamaViews.collate(parts)
        assert batch["mask"].sum(1).tolist() == [30, 1, 2, 17]
        assert batch["mask"].shape == (4, 30)
        assert batch["anchor_mask"].sum(1).tolist() == [4, 1, 1, 3]
        for b, part in enumerate(parts):
            n, k = len(part["features"]), len(part["anchors"])
            assert torch.equal(batch["features"][b, :n], part["features"])
            assert not batch["features"][b, n:].any()
            assert torch.equal(batch["polar"][b, :k, :n], part["polar"])

    def test_bad_arguments(self):
        with pytest.raises(ValueError, match="max_tiles is 0, expected 1 or more"):
            PamaViews(max_tiles=0)
        with pytest.raises(ValueError, match="have no coordinates"):
            PamaViews()(SlideTiles(torch.randn(2, 6), torch.full((2, 2), torch.nan)), torch.Generator())


class TestPretraining:
    @settings(deadline=None, max_examples=20)
    @given(tiles=st.lists(st.integers(1, 40), min_size=1, max_size=4), ratio=st.floats(0.05, 0.95))
    def test_what_is_hidden(self, tiles, ratio):
        """The share asked for, of tiles and not of padding; one is hidden, and one shown if there are two."""
        module = PamaPretraining(create_slide_encoder("test_pama", 6), mask_ratio=ratio, decoder_dim=8)
        mask = torch.arange(max(tiles))[None] < torch.tensor(tiles)[:, None]
        visible = module.visible(mask)
        assert not (visible & ~mask).any()
        for count, shown in zip(tiles, visible.sum(1).tolist()):
            hidden = count - shown
            assert hidden >= 1
            assert shown >= 1 or count == 1
            assert abs(hidden - ratio * count) <= 0.51 or hidden == 1 or shown == 1

    def test_noise_decides(self):
        noise = torch.tensor([[0.1, 0.9, 0.3, 0.2, 0.0]])
        mask = torch.tensor([[True, True, True, True, False]])
        assert make().visible(mask, noise).tolist() == [[True, False, False, False, False]]

    def test_the_loss_is_of_hidden_tiles_and_the_encoder_sees_the_others(self):
        module = make().eval()
        batch = PamaViews.collate(views())
        hidden = batch["mask"] & ~module.visible(batch["mask"], batch["noise"])
        seen = []
        module.encoder.patch_embed.register_forward_hook(lambda _, inputs, output: seen.append(inputs[0]))
        module.decoder_pred.register_forward_hook(lambda _, inputs, output: seen.append(output))
        loss = module(batch)["loss"]
        error = (seen[1] - batch["features"]).square().mean(-1)
        torch.testing.assert_close(loss, torch.stack([row[h].mean() for row, h in zip(error, hidden)]).mean())
        shown = [row[m & ~h] for row, m, h in zip(batch["features"], batch["mask"], hidden)]
        assert seen[0].shape[1] == max(map(len, shown)) == 8
        for found, want in zip(seen[0], shown):
            assert torch.equal(found[: len(want)], want)
            assert not found[len(want) :].any()
        changed = {**batch, "features": batch["features"] + 9 * hidden[..., None]}
        module(changed)
        assert torch.equal(seen[2], seen[0])
        assert torch.equal(seen[3], seen[1])

    def test_visible_tiles_stand_where_they_lie(self):
        """Each visible tile's embedding, and the mask token at all others, enters the decoder at its own place."""
        module = make().eval()
        batch = PamaViews.collate(views())
        visible = module.visible(batch["mask"], batch["noise"])
        entered = []
        module.decoder_blocks[0].register_forward_pre_hook(lambda _, inputs: entered.append(inputs[0][:, 1:]))
        module(batch)
        is_token = (entered[0] == module.mask_token).all(-1)
        assert torch.equal(is_token, ~visible)
        swapped = {name: value.clone() for name, value in batch.items()}
        first, second = visible[0].nonzero()[:2, 0]
        swapped["features"][0, first] += 3
        module(swapped)
        moved = (entered[1] - entered[0]).abs().sum(-1)[0]
        assert moved.argmax() == first != second

    @pytest.mark.parametrize("mode", [True, False])
    def test_a_batch_is_the_mean_of_its_slides(self, mode):
        """Dropped anchors included: they are drawn with the view."""
        module = make(anchor_drop_rate=0.4).train(mode)
        parts = views()
        together = module(PamaViews.collate(parts))["loss"]
        alone = [module(PamaViews.collate([part]))["loss"] for part in parts]
        torch.testing.assert_close(together, torch.stack(alone).mean())

    def test_what_stands_in_the_padding_does_not_matter(self):
        module = make()
        batch = PamaViews.collate(views())
        dirty = {name: value.clone() for name, value in batch.items()}
        dirty["features"][~batch["mask"]] = torch.nan
        dirty["noise"][~batch["mask"]] = -1.0
        dirty["anchor_noise"][~batch["anchor_mask"]] = -1.0
        dirty["polar"][~batch["mask"][:, None].expand_as(batch["polar"])] = 5
        torch.testing.assert_close(module(dirty)["loss"], module(batch)["loss"])

    def test_without_geometry_it_is_computed(self):
        module = make().eval()
        batch = PamaViews.collate(views())
        bare = {name: batch[name] for name in ("features", "grid", "mask", "noise")}
        torch.testing.assert_close(module(bare)["loss"], module(batch)["loss"])

    @pytest.mark.parametrize("compat", [False, True])
    def test_every_parameter_learns(self, compat):
        module = make(compat=compat, shared_polar=compat).train()
        output = module(PamaViews.collate(views()))
        output["loss"].backward()
        idle = [name for name, p in module.named_parameters() if p.grad is None or not p.grad.any()]
        assert idle == []
        assert set(output) == {"loss", "feature_cosine", "feature_rank"}

    def test_autocast(self):
        module = make().eval()
        batch = PamaViews.collate(views())
        with torch.autocast("cpu", torch.bfloat16):
            loss = module(batch)["loss"]
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, module(batch)["loss"], atol=0.05, rtol=0.05)

    @pytest.mark.slow
    def test_it_learns_what_lies_where(self):
        """Slides of two islands: who knows both, but not which is where, errs by 0.5, and who knows neither by 1."""
        torch.manual_seed(0)
        encoder = create_slide_encoder("test_pama", 2, anchor_drop_rate=0.0)
        module = PamaPretraining(encoder, decoder_dim=16, decoder_depth=2, decoder_heads=2)
        optimizer = torch.optim.Adam(module.parameters(), 1e-2)
        generator = torch.Generator().manual_seed(0)
        island = torch.cartesian_prod(torch.arange(3.0), torch.arange(4.0))
        grid = torch.cat([island, island + torch.tensor([20.0, 0.0])])
        view = PamaViews.of(encoder)(SlideTiles(torch.zeros(24, 2), grid), generator)
        batch, losses = PamaViews.collate([view] * 16), []
        for _ in range(160):
            batch["features"] = torch.randn(16, 2, 2, generator=generator).sign().repeat_interleave(12, dim=1)
            batch["noise"] = torch.rand(16, 24, generator=generator)
            loss = module(batch)["loss"]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[0] > 0.8
        assert sum(losses[-10:]) / 10 < 0.3

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"mask_ratio": 0.0}, "mask_ratio is 0.0"),
            ({"mask_ratio": 1.0}, "mask_ratio is 1.0"),
            ({"decoder_depth": 0}, "decoder_depth is 0"),
            ({"decoder_dim": 9}, "num_heads is 8, expected a divisor of the width 9"),
        ],
    )
    def test_bad_arguments(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            PamaPretraining(create_slide_encoder("test_pama", 6), **arguments)

    def test_bad_encoders_and_batches(self):
        with pytest.raises(ValueError, match="the encoder is a Linear, expected a PAMA"):
            PamaPretraining(torch.nn.Linear(2, 2))
        batch = PamaViews.collate(views())
        with pytest.raises(ValueError, match=r"expected \(B, N, 6\)"):
            make()({**batch, "features": batch["features"][..., :5]})
