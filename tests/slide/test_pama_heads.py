"""Classifiers on PAMA: as aggregators, with slides larger than the encoder reads, and the frozen probe."""

from __future__ import annotations

import pytest
import torch

from ssmamba_models.slide import create_slide_encoder
from ssmamba_models.slide.pama_heads import PamaClassifier, PamaLinearProbe

pytestmark = pytest.mark.usefixtures("one_thread")


def make(cls=PamaClassifier, **arguments):
    torch.manual_seed(0)
    return cls(create_slide_encoder("test_pama", 6, **arguments), 3)


def bags(*tiles: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    most = max(tiles)
    mask = torch.arange(most)[None] < torch.tensor(tiles)[:, None]
    coords = torch.randint(0, 20, (len(tiles), most, 2), generator=generator) * 512
    return torch.randn(len(tiles), most, 6, generator=generator), coords, mask


@pytest.mark.parametrize("cls", [PamaClassifier, PamaLinearProbe])
@pytest.mark.parametrize("max_tiles", [2048, 10])
def test_a_bag_does_not_depend_on_its_batch(cls, max_tiles):
    model = make(cls, max_tiles=max_tiles).eval()
    features, coords, mask = bags(30, 1, 14)
    output = model(features, coords, mask)
    for b, tiles in enumerate((30, 1, 14)):
        alone = model(features[b : b + 1, :tiles], coords[b : b + 1, :tiles])
        torch.testing.assert_close(alone["logits"], output["logits"][b : b + 1], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(alone["attention"][0], output["attention"][b, :tiles], atol=1e-5, rtol=1e-4)
        assert (output["attention"][b] > 0).sum() == min(tiles, max_tiles)
    torch.testing.assert_close(output["attention"].sum(1), torch.ones(3))


def test_large_slides_are_sampled_anew_in_training():
    model = make(max_tiles=10).train()
    features, coords, _ = bags(40)
    seen = {tuple((model(features, coords)["attention"][0] > 0).tolist()) for _ in range(4)}
    assert len(seen) == 4
    assert {sum(tiles) for tiles in seen} == {10}


def test_fine_tuning_trains_everything():
    model = make().train()
    features, coords, mask = bags(30, 14)
    model.loss(model(features, coords, mask), torch.tensor([0, 2])).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    assert model.encoder.patch_embed.weight.grad.any()


def test_the_probe_trains_its_linear_layer_alone():
    model = make(PamaLinearProbe, drop_rate=0.5, anchor_drop_rate=0.5).train()
    features, coords, mask = bags(30, 14, 9)
    output = model(features, coords, mask)
    torch.testing.assert_close(model(features, coords, mask)["logits"], output["logits"])  # nothing is dropped
    model.loss(output, torch.tensor([0, 2, 1])).backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == {"head.weight", "head.bias"}
    vectors = model.encoder(features, coords, mask)
    normed = (vectors - vectors.mean(0)) / (vectors.var(0, unbiased=False) + 1e-6).sqrt()
    torch.testing.assert_close(output["logits"], model.head(normed), atol=1e-4, rtol=1e-4)


def test_bad_input():
    features, coords, _ = bags(5)
    with pytest.raises(ValueError, match="PamaClassifier needs coords"):
        make()(features)
    with pytest.raises(ValueError, match="batches of 2 slides or more"):
        make(PamaLinearProbe).train()(features, coords)
