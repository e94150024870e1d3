"""PAMA: its attention against the published formulas, turns of the slide, padding, dropped anchors, whole slides."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from ssmamba_models.slide import create_slide_encoder
from ssmamba_models.slide.pama import PAMA
from ssmamba_models.slide.pama_attention import PACA, PamaBlock, PamaPosition, main_sectors, one_hot_sectors
from ssmamba_models.slide.slide_weights import load_slide_encoder, save_slide_encoder

pytestmark = pytest.mark.usefixtures("one_thread")


def make(**arguments) -> PAMA:
    torch.manual_seed(0)
    return create_slide_encoder("test_pama", 6, **arguments).eval()


def slide(tiles: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Features (tiles, 6) and grid (tiles, 2)."""
    generator = torch.Generator().manual_seed(seed)
    place = torch.randperm(144, generator=generator)[:tiles]
    grid = torch.stack([place % 12, place // 12], dim=-1).float()
    return torch.randn(tiles, 6, generator=generator), grid


def turned(grid: torch.Tensor) -> torch.Tensor:
    return torch.stack([-grid[..., 1], grid[..., 0]], dim=-1) + 5


def position(anchors: int = 3, tokens: int = 10, bins: int = 8) -> tuple[PamaPosition, torch.Tensor]:
    """One slide whose first token has no direction and whose last is padding; and the sectors (1, K, L)."""
    mask = torch.ones(1, tokens, dtype=torch.bool)
    mask[:, -1] = False
    polar = torch.randint(0, bins, (1, anchors, tokens))
    polar[..., 0] = bins
    distance = torch.randint(0, 65, (1, anchors, tokens))
    found = PamaPosition(distance, one_hot_sectors(polar, mask, bins), mask, torch.ones(1, anchors, dtype=torch.bool))
    return found, polar


class TestPaca:
    """With 3 anchors, 10 tokens, 2 heads of 4."""

    def inputs(self):
        torch.manual_seed(0)
        return torch.randn(1, 10, 8), torch.randn(1, 3, 8), *position()

    @pytest.mark.parametrize("shared_polar", [False, True])
    @pytest.mark.parametrize("kro", [False, True])
    def test_it_is_the_formula(self, kro, shared_polar):
        tiles, anchors, where, polar = self.inputs()
        module = PACA(8, 2, kro=kro, shared_polar=shared_polar)
        (new_tiles, new_anchors), (by_tile, by_anchor) = module(tiles, anchors, where)
        q, k, v = module.qkv(tiles)[0].chunk(3, dim=-1)
        anchor_q, anchor_k, anchor_v = module.qkv(anchors)[0].chunk(3, dim=-1)
        of_tiles, of_anchors = [], []
        for head in range(2):
            part = slice(4 * head, 4 * head + 4)
            scores = anchor_q[:, part] @ k[:, part].T / 2
            bias = torch.zeros(3, 10)
            for a in range(3):
                votes = [sum(abs(scores[a, j]) for j in range(1, 9) if polar[0, a, j] == r) for r in range(8)]
                main = max(range(8), key=lambda r: votes[r]) if kro else 0
                for j in range(10):
                    bias[a, j] = module.distance_embed.weight[where.distance[0, a, j], head]
                    if 1 <= j <= 8:
                        sector = (polar[0, a, j] - main) % 8
                        bias[a, j] += module.polar_embed.weight[sector, 0 if shared_polar else head]
            want = (scores + bias)[:, :9].softmax(dim=1)
            torch.testing.assert_close(by_anchor[0, head], F.pad(want, (0, 1)))
            of_anchors.append(want @ v[:9, part])
            want = (q[:, part] @ anchor_k[:, part].T / 2 + bias.T).softmax(dim=1)
            torch.testing.assert_close(by_tile[0, head, :9], want[:9])
            of_tiles.append(want @ anchor_v[:, part])
        torch.testing.assert_close(new_anchors[0], module.proj(torch.cat(of_anchors, dim=1)))
        torch.testing.assert_close(new_tiles[0, :9], module.proj(torch.cat(of_tiles, dim=1))[:9])

    @pytest.mark.parametrize("shift", range(1, 8))
    def test_reorientation_undoes_a_shift_of_an_anchors_sectors(self, shift):
        tiles, anchors, where, polar = self.inputs()
        shifted = polar.clone()
        shifted[:, 1] = torch.where(polar[:, 1] < 8, (polar[:, 1] + shift) % 8, 8)
        moved = replace(where, sectors=one_hot_sectors(shifted, where.mask, 8))
        assert not torch.equal(moved.sectors, where.sectors)
        for kro in (True, False):
            module = PACA(8, 2, kro=kro)
            (want, found) = (module(tiles, anchors, given)[0] for given in (where, moved))
            same = all(torch.allclose(a, b, atol=1e-6) for a, b in zip(want, found))
            assert same == kro

    def test_padding_and_what_has_no_direction_do_not_vote(self):
        scores = torch.tensor([[[[9.0, -2.0, 1.0, 1.5, 99.0]]]])
        polar = torch.tensor([[[8, 3, 5, 5, 6]]])
        mask = torch.tensor([[True, True, True, True, False]])
        assert main_sectors(scores, one_hot_sectors(polar, mask, 8)).item() == 5

    def test_no_gradient_goes_through_the_vote(self):
        where, _ = position()
        scores = torch.randn(1, 2, 3, 10, requires_grad=True)
        assert not main_sectors(scores, where.sectors).requires_grad

    def test_before_training_what_is_near_is_read_most(self):
        module = PACA(8, 4)
        torch.nn.init.zeros_(module.qkv.weight)
        torch.nn.init.zeros_(module.polar_embed.weight)
        far = torch.arange(65)[None, None]
        sectors = one_hot_sectors(torch.zeros_like(far), torch.ones(1, 65, dtype=torch.bool), 8)
        where = PamaPosition(far, sectors, torch.ones(1, 65, dtype=torch.bool), torch.ones(1, 1, dtype=torch.bool))
        _, (_, by_anchor) = module(torch.randn(1, 65, 8), torch.randn(1, 1, 8), where)
        assert (by_anchor.diff(dim=-1) < 0).all()
        # Each head looks farther than the one before.
        assert (by_anchor[0, :, 0, :8].sum(-1).diff() < 0).all()

    def test_heads_that_do_not_divide(self):
        with pytest.raises(ValueError, match="num_heads is 3, expected a divisor of the width 8"):
            PACA(8, 3)

    def test_compat_adds_to_the_normalised_input(self):
        tiles, anchors, where, _ = self.inputs()
        torch.manual_seed(0)
        plain = PamaBlock(8, 2).eval()
        compat = PamaBlock(8, 2, compat=True).eval()
        compat.load_state_dict(plain.state_dict())
        normed = plain.norm1(tiles), plain.norm1(anchors)
        read, _ = plain.attn(*normed, where)
        for block, kept in ((plain, (tiles, anchors)), (compat, normed)):
            for x, y, found in zip(kept, read, block(tiles, anchors, where)[0]):
                torch.testing.assert_close(found, x + y + plain.mlp(plain.norm2(x + y)))


class TestEncoder:
    def test_turning_the_slide(self):
        """With KRO nothing changes; without, more than another slide would."""
        features, grid = slide(60)
        moved = {}
        for kro in (True, False):
            encoder = make(kro=kro)
            vector, after = encoder(features[None], grid[None]), encoder(features[None], turned(grid)[None])
            moved[kro] = ((after - vector).norm() / vector.norm()).item()
        assert moved[True] < 1e-5 < 0.02 < moved[False]

    def test_layout_matters(self):
        features, grid = slide(60)
        encoder = make()
        other = encoder(features[torch.randperm(60)][None], grid[None])
        assert (other - encoder(features[None], grid[None])).norm() > 0.01

    @pytest.mark.parametrize("compat", [False, True])
    def test_padding_and_other_slides_change_nothing(self, compat):
        encoder = make(compat=compat, shared_polar=compat)
        slides = [slide(tiles, seed) for seed, tiles in enumerate((30, 1, 17))]
        features, grid = torch.full((3, 34, 6), torch.nan), torch.full((3, 34, 2), torch.nan)
        mask = torch.zeros(3, 34, dtype=torch.bool)
        for b, (x, g) in enumerate(slides):
            place = torch.randperm(34)[: len(x)].sort().values  # padding may be anywhere
            features[b, place], grid[b, place], mask[b, place] = x, g, True
        together = encoder(features, grid, mask)
        alone = torch.cat([encoder(x[None], g[None]) for x, g in slides])
        torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-4)

    def test_geometry_that_is_given_is_used(self):
        encoder, (features, grid) = make(), slide(40)
        mask = torch.ones(1, 40, dtype=torch.bool)
        geometry = encoder.geometry(grid[None], mask)
        want = encoder(features[None], grid[None])
        torch.testing.assert_close(encoder(features[None], torch.zeros(1, 40, 2), geometry=geometry), want)
        other = replace(geometry, distance=geometry.distance.flip(1))
        assert not torch.allclose(encoder(features[None], grid[None], geometry=other), want, atol=1e-4)

    def test_class_token(self):
        """At the mean distance, without direction; with compat in the mean sector, and an anchor's tile in sector 0."""
        _, grid = slide(20)
        mask = torch.arange(24)[None] < 20
        grid = F.pad(grid, (0, 0, 0, 4))[None]
        for compat in (False, True):
            encoder = make(compat=compat)
            geometry = encoder.geometry(grid, mask)
            found = encoder.position(geometry, mask, geometry.anchor_mask)
            distance, polar = geometry.distance[0, :, :20].long(), geometry.polar[0, :, :20].long()
            assert torch.equal(found.distance[0, :, 0], distance.float().mean(1).floor().long())
            sectors = found.sectors[0, :, 0]
            if compat:
                polar = polar.masked_fill(polar == 8, 0)
                assert torch.equal(sectors.argmax(-1), polar.float().mean(1).floor().long())
            else:
                assert sectors.eq(0).all()
            own = found.sectors[0, torch.arange(3), 1 + geometry.anchors[0]]
            assert torch.equal(own, F.one_hot(torch.zeros(3).long(), 8).float() * compat)
            assert found.sectors[0, :, 21:].eq(0).all()

    def test_anchors_are_dropped_in_training_alone(self):
        encoder, (features, grid) = make(anchor_drop_rate=0.4), slide(80)
        geometry = encoder.geometry(grid[None], torch.ones(1, 80, dtype=torch.bool))
        noise = torch.rand(1, 11)
        assert encoder.tokens(features[None], None, geometry=geometry, anchor_noise=noise).anchor_mask.all()
        encoder.train()
        found = encoder.tokens(features[None], None, geometry=geometry, anchor_noise=noise)
        assert found.anchor_mask.sum() == 6  # 0.6 * 11
        assert noise[found.anchor_mask].max() < noise[~found.anchor_mask].min()
        assert found.class_weights[..., ~found.anchor_mask[0]].eq(0).all()
        masks = {tuple(encoder.tokens(features[None], grid[None]).anchor_mask[0].tolist()) for _ in range(8)}
        assert len(masks) > 1
        alone = encoder.tokens(*(x[None] for x in slide(1)))
        assert alone.anchor_mask.tolist() == [[True]]

    def test_kept_anchors_are_scaled(self):
        """In training the anchors' token counts for 1 / (1 - rate): the same as that much larger a token in eval."""
        encoder, (features, grid) = make(anchor_drop_rate=0.2, depth=2), slide(3)
        training = encoder.train()(features[None], grid[None])
        with torch.no_grad():
            encoder.anchor_token /= 0.8
        torch.testing.assert_close(encoder.eval()(features[None], grid[None]), training)

    def test_attention_tells_which_tiles_count(self):
        encoder, (features, grid) = make(), slide(30)
        mask = torch.arange(33)[None] < 30
        tokens = encoder.tokens(F.pad(features, (0, 0, 0, 3))[None], F.pad(grid, (0, 0, 0, 3))[None], mask)
        assert tokens.attention.shape == (1, 33)
        assert tokens.anchor_weights.shape == (1, 2, 4, 33)
        torch.testing.assert_close(tokens.attention.sum(1), torch.ones(1))
        torch.testing.assert_close(tokens.class_weights.sum(-1), torch.ones(1, 2))
        assert tokens.attention[~mask].eq(0).all()
        assert tokens.attention[mask].gt(0).all()
        assert torch.equal(tokens.geometry.anchors[0], encoder.slide_geometry(grid).anchors)

    def test_every_parameter_has_a_gradient_and_autocast_works(self):
        encoder, (features, grid) = make(anchor_drop_rate=0.0).train(), slide(30)
        with torch.autocast("cpu", torch.bfloat16):
            vector = encoder(features[None], grid[None])
        vector.float()[0, 0].backward()
        assert [name for name, p in encoder.named_parameters() if p.grad is None] == []
        torch.testing.assert_close(vector.float(), encoder(features[None], grid[None]), atol=0.1, rtol=0.1)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"depth": 1}, "depth is 1, expected 2 or more"),
            ({"num_heads": 5}, "num_heads is 5"),
            ({"max_tiles": 0}, "max_tiles is 0"),
            ({"anchor_drop_rate": 1.0}, "anchor_drop_rate is 1.0"),
            ({"anchor_drop_rate": math.nan}, "anchor_drop_rate is nan"),
        ],
    )
    def test_bad_arguments(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            make(**arguments)

    def test_missing_coordinates(self):
        encoder, (features, grid) = make(), slide(5)
        with pytest.raises(ValueError, match="needs where the tiles lie"):
            encoder(features[None], None)
        grid[2, 0] = torch.nan
        with pytest.raises(ValueError, match="1 of 5 tiles have no coordinates"):
            encoder(features[None], grid[None])

    def test_saved_and_read(self, tmp_path):
        encoder, (features, grid) = make(kro=False, num_heads=4), slide(12)
        save_slide_encoder(encoder, tmp_path)
        again = load_slide_encoder(tmp_path)
        torch.testing.assert_close(again(features[None], grid[None]), encoder(features[None], grid[None]))


class TestEmbed:
    def test_a_slide_that_fits_is_read_whole(self):
        encoder, (features, grid) = make().train(), slide(40)
        vector = encoder.embed(features.half(), grid, seed=1, views=3)
        torch.testing.assert_close(vector, encoder.eval()(features.half().float()[None], grid[None])[0])
        assert not encoder.embed(features, grid).requires_grad

    def test_a_larger_one_is_sampled_by_the_seed(self):
        encoder, (features, grid) = make(max_tiles=20), slide(90)
        one, again, other = (encoder.embed(features, grid, seed=seed) for seed in (1, 1, 2))
        assert torch.equal(one, again)
        assert not torch.allclose(one, other, atol=1e-4)
        whole = make()(features[None], grid[None])[0]
        torch.testing.assert_close(encoder.embed(features, grid, tiles="all"), whole)
        torch.testing.assert_close(encoder.embed(features, grid, tiles=90), whole)

    def test_several_samples_are_averaged(self):
        encoder, (features, grid) = make(max_tiles=20), slide(90)
        averages = torch.stack([encoder.embed(features, grid, seed=seed, views=30) for seed in (1, 2)])
        single = torch.stack([encoder.embed(features, grid, seed=seed) for seed in (1, 2)])
        assert averages.diff(dim=0).norm() < single.diff(dim=0).norm()

    def test_a_slide_of_100_000_tiles(self):
        """Nothing as long as the slide is made, but what draws the sample."""
        encoder = make(max_tiles=256, tiles_per_anchor=32)
        seen = []
        encoder.patch_embed.register_forward_hook(lambda module, inputs, output: seen.append(output.shape[1]))
        features = torch.randn(100_000, 6)
        grid = torch.stack([torch.arange(100_000) % 400, torch.arange(100_000) // 400], dim=-1).float()
        assert encoder.embed(features, grid, views=2).isfinite().all()
        assert seen == [256, 256]

    @pytest.mark.parametrize("options", [{"views": 0}, {"tiles": 0}, {"tiles": "most"}, {"tiles": 2.5}])
    def test_bad_options(self, options):
        with pytest.raises(ValueError, match=f"{next(iter(options))} is .*expected 1 or more"):
            make().embed(*slide(5), **options)
