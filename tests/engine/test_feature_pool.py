"""Features pooled as the mean and the deviation of an encoder's map."""

import h5py
import pytest
import timm
import torch
from click.testing import CliRunner

from ssmamba_models.cli.main import main
from ssmamba_models.data.synthetic import write_synthetic_tiles
from ssmamba_models.engine.encoder import load_encoder
from ssmamba_models.engine.feature_pool import pool_features

pytestmark = pytest.mark.filterwarnings("ignore::ssmamba_models.engine.encoder.RandomWeightsWarning")


def standardised(x):
    return (x - x.mean(1, keepdim=True)) / (x.var(1, correction=0, keepdim=True) + 1e-5).sqrt()


@pytest.mark.parametrize("name", ["test_ssmamba", "test_resnet", "test_vit", "test_efficientnet"])
@torch.inference_mode()
def test_mean_and_deviation_of_what_the_intermediates_show(name):
    """Maps channels last and first, and tokens with a class token before them."""
    model = timm.create_model(name, num_classes=0).eval()
    images = torch.randn(2, 3, *model.pretrained_cfg["input_size"][1:])
    (last,) = model.forward_intermediates(
        images, indices=1, norm=name == "test_vit", output_fmt="NCHW", intermediates_only=True
    )
    if name == "test_efficientnet":  # its head convolution stands between the last stage and the map
        last = model.forward_features(images)
    places = last.flatten(2)
    found = pool_features(model, images, "mean_std")
    wanted = torch.cat([standardised(places.mean(2)), standardised(places.std(2, correction=0))], 1)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(pool_features(model, images, "model"), model(images))


@pytest.mark.parametrize("name", ["test_ssmamba", "test_resnet", "test_vit", "test_efficientnet"])
@torch.inference_mode()
def test_the_map_before_the_last_stands_in_front(name):
    model = timm.create_model(name, num_classes=0).eval()
    images = torch.randn(2, 3, *model.pretrained_cfg["input_size"][1:])
    before = model.forward_intermediates(images, norm=True, output_fmt="NCHW", intermediates_only=True)[-2].flatten(2)
    found = pool_features(model, images, "mean_std_last2")
    wanted = torch.cat([standardised(before.mean(2)), standardised(before.std(2, correction=0))], 1)
    torch.testing.assert_close(found[:, : wanted.shape[1]], wanted, rtol=1e-4, atol=1e-4)
    last = pool_features(model, images, "mean_std")
    torch.testing.assert_close(found[:, wanted.shape[1] :], last, rtol=1e-4, atol=1e-4)
    four = pool_features(model, images, "mean_std_last4")
    assert four.shape[1] > found.shape[1]
    torch.testing.assert_close(four[:, -found.shape[1] :], found, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("pool", "width"), [("mean_std", 96), ("mean_std_last2", 160), ("mean_std_last4", 240)])
def test_an_encoder_tells_its_pool_where_it_is_not_the_models(pool, width):
    plain, pooled = (load_encoder("test_ssmamba", pool=pool) for pool in ("model", pool))
    assert pooled.embed_dim == width
    assert pooled.embed(torch.randn(3, 3, 64, 64)).shape == (3, pooled.embed_dim)
    assert pooled.provenance() == {**plain.provenance(), "pool": pool}


def test_unknown_pools_and_models_without_places_are_named():
    with pytest.raises(ValueError, match="pool is 'max', expected one of model, mean_std"):
        load_encoder("test_ssmamba", pool="max")

    class Flat(torch.nn.Module):
        def forward_features(self, images):
            return images.mean((2, 3))

    with pytest.raises(ValueError, match=r"Flat\.forward_features gives \(1, 3\), which has no places"):
        pool_features(Flat(), torch.zeros(1, 3, 8, 8), "mean_std")
    with pytest.raises(ValueError, match=r"Flat has no intermediate maps .*; use --pool mean_std"):
        pool_features(Flat(), torch.zeros(1, 3, 8, 8), "mean_std_last2")


def test_a_model_that_gives_no_such_maps_is_told_from_a_wrong_size():
    """Hiera refuses to normalise intermediate maps."""
    hiera = "hiera_tiny_224"
    assert load_encoder(hiera, pool="mean_std").embed_dim == 2 * 768
    with pytest.raises(ValueError, match=r"^Hiera does not give its last 2 maps \(.*norm.*\); use --pool mean_std$"):
        load_encoder(hiera, pool="mean_std_last2")


def test_embed_and_evaluate_take_it(tmp_path):
    tiles = write_synthetic_tiles(tmp_path / "tiles", tiles_per_kind=6, size=32)
    model = ["--model", "test_ssmamba", "--img-size", "32", "--workers", "0", "--quiet", "--pool", "mean_std"]
    done = CliRunner().invoke(main, ["embed", str(tiles), *model, "--out", str(tmp_path / "f.h5")])
    assert done.exit_code == 0, done.output
    with h5py.File(tmp_path / "f.h5") as file:
        assert file["features"].shape[1] == 96
        assert file.attrs["pool"] == "mean_std"
    model[1] = "test_ssmamba@none"
    out = ["--out", str(tmp_path / "report"), "--seeds", "1", "--folds", "2"]
    evaluated = ["evaluate", "--data", str(tiles), *model, *out]
    done = CliRunner().invoke(main, evaluated)
    assert done.exit_code == 0, done.output
    assert "mean_std" in (tmp_path / "report" / "report.md").read_text()
    # Features of another pool are not used again.
    done = CliRunner().invoke(main, [*evaluated, "--pool", "model", "--overwrite"])
    assert done.exit_code == 0, done.output
    assert "mean_std" not in (tmp_path / "report" / "report.md").read_text()
