"""MAMIM: its losses mean what they say, masked pixels stay hidden, and the encoder stays a plain timm model."""

import math

import pytest
import timm
import torch
from mamim_cases import hide, make, make_batch
from torch import nn

from ssmamba_models.ssl.info_nce import two_way_info_nce
from ssmamba_models.ssl.mamim import MAMIM, feature_spread, patch_color
from ssmamba_models.ssl.mamim_views import MamimViews

pytestmark = pytest.mark.usefixtures("one_thread")


def test_the_loss_is_the_weighted_sum_of_its_parts():
    out = make(cross_weight=0.3, color_weight=0.7)(make_batch())
    parts = {"low", "high", "color", "feature", "cross_feature", "cross", "local"}
    assert set(out) == {"loss", *parts, "feature_cosine", "feature_rank"}
    assert out["feature"] == out["cross_feature"] == out["local"] == 0
    torch.testing.assert_close(out["loss"], out["low"] + out["high"] + 0.7 * out["color"] + 0.3 * out["cross"])
    assert not any(out[name].requires_grad for name in ("feature_cosine", "feature_rank"))


def test_a_prediction_of_zero_costs_the_variance_of_normalised_pixels():
    mamim = make()
    nn.init.zeros_(mamim.decoder.to_pixels.weight)
    out = mamim(make_batch())
    pixels = 16 * 16 * 3
    for view in ("low", "high"):  # normalised by the unbiased variance
        assert out[view].item() == pytest.approx((pixels - 1) / pixels, rel=1e-3)


def test_without_alignment_there_is_no_predictor_and_no_cross_loss():
    mamim = make(cross_weight=0.0)
    out = mamim(make_batch())
    assert out["cross"] == 0
    assert not any("predictor" in name for name, _ in mamim.named_parameters())


def test_without_colour_nothing_of_it_is_learned():
    mamim = make(color_weight=0.0)
    out = mamim(make_batch())
    assert out["color"] == 0
    torch.testing.assert_close(out["loss"], out["low"] + out["high"] + 0.3 * out["cross"])
    out["loss"].backward()
    wanted = {name for name, p in mamim.named_parameters() if p.requires_grad}
    assert wanted == {name for name, p in mamim.named_parameters() if p.grad is not None}


def test_the_colour_of_a_patch_is_what_normalising_takes_away():
    pixels = torch.randn(5, 16 * 16, 3) * torch.tensor([0.5, 1.0, 2.0]) + torch.tensor([1.0, -1.0, 0.0])
    color = patch_color(pixels.flatten(1))
    torch.testing.assert_close(color[:, :3], pixels.mean(1))
    torch.testing.assert_close(color[:, 3:].exp() - 0.05, pixels.std(1))


def test_colour_is_asked_of_hidden_patches_alone():
    mamim, batch = make(), make_batch()
    for head in (mamim.decoder.to_pixels, mamim.decoder.to_color):
        nn.init.zeros_(head.weight)
    before = mamim(batch)["color"].item()
    visible = {**batch, "low": torch.where(hide(batch, "low"), batch["low"], batch["low"] + 1)}
    hidden = {**batch, "low": torch.where(hide(batch, "low"), batch["low"] + 1, batch["low"])}
    assert mamim(visible)["color"].item() == pytest.approx(before, rel=1e-6)
    assert mamim(hidden)["color"].item() != pytest.approx(before, rel=1e-2)


def test_a_tile_is_found_among_others_once_features_tell_them_apart():
    """The contrastive loss of aligned views falls from chance, log B, and features stay apart."""
    mamim, batch = make(), make_batch(8)
    optimizer = torch.optim.AdamW([p for p in mamim.parameters() if p.requires_grad], 3e-3)
    losses = []
    for _ in range(40):
        out = mamim(batch)
        out["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(out["cross"].item())
    assert losses[-1] < 0.5 * math.log(8)
    assert out["feature_cosine"] < 0.99


def test_a_view_aligned_with_itself_agrees():
    mamim = make(alignment="cosine")
    mamim.predictor = nn.Identity()
    batch = make_batch()
    same = {
        "low": batch["low"],
        "high": batch["low"],
        "low_mask": batch["low_mask"],
        "high_mask": batch["low_mask"],
        "theta": torch.tensor([[1.0, 0, 0], [0, 1, 0]]).expand(4, 2, 3),
    }
    assert mamim(same)["cross"].item() == pytest.approx(0, abs=1e-5)
    assert mamim(batch)["cross"].item() > 1e-4


@pytest.mark.parametrize("masked_state", ["token", "hold"])
@pytest.mark.parametrize("view", ["low", "high"])
def test_masked_pixels_reach_no_feature(masked_state, view):
    mamim, batch = make(masked_state=masked_state).eval(), make_batch()
    hidden = hide(batch, view)
    before = mamim(batch)
    other = {**batch, view: torch.where(hidden, torch.randn_like(batch[view]), batch[view])}
    after = mamim(other)
    for name in ("cross", "feature_cosine", "feature_rank"):  # of features alone
        assert before[name].item() == after[name].item()
    assert before[view].item() != after[view].item()  # the target has changed
    seen = mamim({**batch, view: torch.where(hidden, batch[view], torch.randn_like(batch[view]))})
    assert before["cross"].item() != seen["cross"].item()


def test_visible_patches_do_not_enter_the_pixel_loss():
    """With a prediction of zero the loss depends on targets alone: flat visible patches change nothing."""
    mamim, batch = make(), make_batch()
    nn.init.zeros_(mamim.decoder.to_pixels.weight)
    flat = {**batch, "low": torch.where(hide(batch, "low"), batch["low"], torch.zeros_like(batch["low"]))}
    assert mamim(flat)["low"].item() == pytest.approx(mamim(batch)["low"].item(), rel=1e-6)


def test_hold_and_token_differ():
    """In scans that are heard from the start: the others' first states are too small for float32 to tell."""
    batch = make_batch()
    hold, token = (make(scan_init="unit", masked_state=state)(batch)["cross"].item() for state in ("hold", "token"))
    assert abs(hold - token) > 1e-5


@pytest.mark.parametrize("masked_state", ["token", "hold"])
def test_every_parameter_but_the_encoders_head_learns(masked_state):
    mamim = make(masked_state=masked_state)
    mamim(make_batch())["loss"].backward()
    silent = [name for name, p in mamim.named_parameters() if p.grad is None or not p.grad.any()]
    assert silent == [name for name, _ in mamim.named_parameters() if name.startswith("encoder.head.")]
    assert not any(p.requires_grad for p in mamim.encoder.head.parameters())


def test_the_cosine_alignments_target_gets_no_gradient():
    """The high view's pixels reach the loss through the pixel loss alone, once the target is cut off."""
    mamim, batch = make(alignment="cosine", cross_weight=1.0), make_batch()
    high = batch["high"].requires_grad_()
    mamim(batch)["cross"].backward()
    assert high.grad is None or not high.grad.any()


def test_the_encoder_stays_a_plain_timm_model():
    mamim = make()
    plain = timm.create_model("test_ssmamba")
    plain.load_state_dict(mamim.encoder.state_dict())
    image = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(plain.eval()(image), mamim.encoder.eval()(image))


def test_it_learns():
    mamim, batch = make(), make_batch(8)
    optimizer = torch.optim.AdamW([p for p in mamim.parameters() if p.requires_grad], 3e-3)
    losses = []
    for _ in range(30):
        out = mamim(batch)
        out["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(out["low"].item() + out["high"].item())
    assert losses[-1] < 0.8 * losses[0]


def test_reconstructions_change_hidden_cells_alone():
    mamim, batch = make().eval(), make_batch()
    pictures = mamim.reconstruct(batch)
    hidden = hide(batch, "low")
    assert all(picture.shape == (4, 3, 64, 64) for picture in pictures.values())
    assert all(picture.min() >= 0 and picture.max() <= 1 for picture in pictures.values())
    assert torch.equal(pictures["predicted"][~hidden], pictures["input"][~hidden])
    assert (pictures["masked"][hidden] == 0.5).all()
    mean, std = (torch.tensor(mamim.encoder.pretrained_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
    torch.testing.assert_close(pictures["input"], (batch["low"] * std + mean).clamp(0, 1))


def test_without_colour_a_reconstruction_keeps_each_patchs_mean():
    """A prediction of zero, in normalised pixels, is the patch's mean grey."""
    mamim, batch = make(color_weight=0.0).eval(), make_batch()
    nn.init.zeros_(mamim.decoder.to_pixels.weight)
    batch["low"] = batch["low"][:, :1].expand(-1, 3, -1, -1) * 0.2  # one grey per pixel, far from 0 and 1
    pictures = mamim.reconstruct(batch)
    cell = (slice(None), 0, slice(0, 16), slice(0, 16))
    hidden = batch["low_mask"][:, 0, 0]
    assert hidden.any()
    predicted, shown = pictures["predicted"][cell][hidden], pictures["input"][cell][hidden]
    torch.testing.assert_close(predicted.mean((1, 2)), shown.mean((1, 2)), atol=2e-3, rtol=0)
    assert predicted.std() < shown.std() + 1


def test_with_colour_a_reconstruction_tells_nothing_of_what_is_hidden():
    mamim, batch = make().eval(), make_batch()
    hidden = hide(batch, "low")
    before = mamim.reconstruct(batch)["predicted"]
    other = {**batch, "low": torch.where(hidden, torch.randn_like(batch["low"]), batch["low"])}
    torch.testing.assert_close(mamim.reconstruct(other)["predicted"][hidden], before[hidden])


def test_feature_spread_tells_collapse_from_variety():
    same = feature_spread(torch.ones(6, 2, 2, 8) + 1e-6 * torch.randn(6, 1, 1, 8))
    assert same["feature_cosine"].item() == pytest.approx(1, abs=1e-4)
    apart = feature_spread(torch.eye(8)[:, None, None, :].expand(8, 2, 2, 8))
    assert apart["feature_cosine"].item() == pytest.approx(0, abs=1e-6)
    assert apart["feature_rank"].item() == pytest.approx(7, abs=0.01)  # centring takes one


def test_features_that_are_not_finite_have_no_spread():
    maps = torch.randn(4, 2, 2, 8)
    maps[0, 0, 0, 0] = torch.inf
    assert all(value.isnan() for value in feature_spread(maps).values())


def test_the_contrast_is_computed_in_float32_under_autocast():
    first, second = torch.randn(2, 16, 48).unbind()
    expected = two_way_info_nce(first, second, 0.2)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(two_way_info_nce(first, second, 0.2), expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"cell_size": 24}, "multiple of patch_size"),
        ({"patch_size": 8}, "third one's stride"),
        ({"masked_state": "drop"}, "token, hold"),
        ({"cross_weight": -1.0}, "cross_weight"),
        ({"color_weight": -1.0}, "color_weight"),
        ({"temperature": 0.0}, "temperature"),
        ({"cross_weight": math.nan}, "cross_weight is nan"),
        ({"color_weight": math.nan}, "color_weight is nan"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"alignment": "none"}, "contrast, cosine, teacher"),
        ({"decoder_depth": -1}, "decoder_depth"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        make(**arguments)


@pytest.mark.parametrize(("model", "kwargs"), [("test_vit", {}), ("test_ssmamba", {"in_chans": 4})])
def test_encoders_that_do_not_fit_are_refused(model, kwargs):
    with pytest.raises(ValueError, match="MAMIM"):
        MAMIM(timm.create_model(model, **kwargs))


def test_views_that_cannot_be_aligned_are_refused():
    batch = make_batch(img_size=80)
    with pytest.raises(ValueError, match="multiples of 32 px"):
        make()(batch)
    assert make(cross_weight=0.0)(batch)["loss"] > 0


def test_a_batch_that_does_not_fit_is_refused():
    batch = make_batch()
    with pytest.raises(ValueError, match="low_mask"):
        make()({**batch, "low_mask": batch["low_mask"][:, :2]})
    with pytest.raises(ValueError, match="expected \\(B, 3, H, W\\)"):
        make()({**batch, "high": batch["high"][:, :1]})


def test_real_tiles_are_reconstructed_better_than_by_their_mean(data_root):
    """Twenty steps on a few real tiles bring the loss below that of predicting each patch's mean."""
    from ssmamba_models.data.tiles import find_tiles

    tiles = find_tiles(data_root / "lc25000")
    from PIL import Image

    views = MamimViews(64, 16)
    paths = [tiles.root / tiles.paths[i] for i in range(0, len(tiles), len(tiles) // 8)][:8]
    drawn = [views(Image.open(p).convert("RGB"), torch.Generator().manual_seed(i)) for i, p in enumerate(paths)]
    batch = {name: torch.stack([view[name] for view in drawn]) for name in drawn[0]}
    mamim = make()
    optimizer = torch.optim.AdamW([p for p in mamim.parameters() if p.requires_grad], 3e-3)
    for _ in range(20):
        out = mamim(batch)
        out["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert out["low"].item() < 0.95
