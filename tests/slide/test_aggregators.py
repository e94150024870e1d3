"""Every aggregator: shapes, padding, attention, gradients, and what a wrong argument says."""

from __future__ import annotations

import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from ssmamba_models.slide.aggregators import aggregator_class, create_aggregator, list_aggregators

pytestmark = pytest.mark.usefixtures("one_thread")

OURS = ["mambamil", "mean", "max", "pama"]
THEIRS = ["abmil", "clam", "dsmil", "transmil", "transformer_abmil", "smabmil", "patchgcn"]
SMALL = {name: {"hidden_dim": 16} for name in (*THEIRS, "max")} | {"mean": {}, "mambamil": {"dim": 16, "d_state": 4}}
SMALL["pama"] = {"model": "test_pama"}


def make(name: str, feature_dim: int = 12, num_classes: int = 2, **kwargs):
    if name in THEIRS:
        pytest.importorskip("torchmil", reason="this aggregator needs the [mil] extra")
    torch.manual_seed(0)
    return create_aggregator(name, feature_dim, num_classes, **SMALL[name] | kwargs)


def grid(columns: int, rows: int, step: int = 224) -> torch.Tensor:
    """(1, columns * rows, 2) coords, row by row."""
    y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    return torch.stack((x, y), -1).reshape(1, -1, 2) * step


def bag(tiles: int = 20, feature_dim: int = 12, seed: int = 0):
    features = torch.randn(1, tiles, feature_dim, generator=torch.Generator().manual_seed(seed))
    return features, grid(5, -(-tiles // 5))[:, :tiles]


def test_the_names():
    assert sorted(list_aggregators()) == sorted(OURS + THEIRS)


@pytest.mark.parametrize("num_classes", [2, 3])
@pytest.mark.parametrize("name", OURS + THEIRS)
def test_logits_attention_and_gradients(name, num_classes):
    model = make(name, num_classes=num_classes)
    features, coords = bag()
    features = torch.cat((features, bag(seed=1)[0]))
    output = model(features, coords.expand(2, -1, -1))
    assert output["logits"].shape == (2, num_classes)
    assert output["attention"].shape == (2, 20)
    assert (output["attention"] >= 0).all()
    torch.testing.assert_close(output["attention"].sum(1), torch.ones(2))
    loss = model.loss(output, torch.tensor([0, num_classes - 1]), torch.rand(num_classes) + 0.5)
    loss.backward()
    assert loss.dim() == 0
    assert loss.isfinite()
    # torchmil's transformer layers hold a second norm that they leave unused without an MLP.
    idle = {n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()}
    # PAMA's last reading is the class token's alone, which lies in no direction.
    assert all("norm2" in n or n == "encoder.blocks.1.attn.polar_embed.weight" for n in idle), idle


@pytest.mark.parametrize("name", OURS + THEIRS)
def test_padding_and_the_rest_of_the_batch_change_nothing(name):
    model = make(name, num_classes=3).eval()
    (long, places), (short, _) = bag(20), bag(7, seed=3)
    features = torch.cat((long, F.pad(short, (0, 0, 0, 13), value=float("nan"))))
    coords = torch.cat((places, F.pad(places[:, :7], (0, 0, 0, 13), value=-5)))
    mask = torch.arange(20)[None] < torch.tensor([[20], [7]])
    together = model(features, coords, mask)
    for place, (one, count) in enumerate(((long, 20), (short, 7))):
        alone = model(one, places[:, :count])
        torch.testing.assert_close(together["logits"][place], alone["logits"][0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(together["attention"][place, :count], alone["attention"][0], rtol=1e-4, atol=1e-5)
    assert not together["attention"][1, 7:].any()


@pytest.mark.parametrize("name", ["abmil", "clam", "dsmil", "mean", "max", "transformer_abmil", "smabmil", "patchgcn"])
def test_the_order_of_the_tiles_does_not_matter(name):
    model = make(name).eval()
    features, coords = bag()
    order = torch.randperm(20, generator=torch.Generator().manual_seed(5))
    want, found = model(features, coords), model(features[:, order], coords[:, order])
    torch.testing.assert_close(found["logits"], want["logits"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found["attention"], want["attention"][:, order], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", OURS + THEIRS)
@pytest.mark.parametrize("tiles", [1, 2, 3])
def test_tiny_bags(name, tiles):
    model = make(name)
    output = model(*bag(tiles))
    model.loss(output, torch.tensor([1])).backward()
    assert output["logits"].isfinite().all()


@pytest.mark.parametrize("name", ["abmil", "clam", "transmil", "transformer_abmil"])
def test_with_one_logit_more_torchmil_is_as_it_was(name):
    """Between our first and last layers stand torchmil's own numbers."""
    model = make(name).eval()
    features, coords = bag()
    inner = model.model
    head = "last_layer" if hasattr(inner, "last_layer") else "classifier"
    with torch.no_grad():
        output = model(features, coords)
        embedded = model.embed(features)
        ours = getattr(inner, head)
        binary = torch.nn.Linear(ours.in_features, 1)
        binary.weight.copy_(ours.weight[1:])
        binary.bias.copy_(ours.bias[1:])
        setattr(inner, head, binary)
        torch.testing.assert_close(inner(embedded), output["logits"][:, 1])


def test_transmil_attention_is_that_of_torchmil():
    model = make("transmil", landmarks=4).eval()
    features, coords = bag(21)
    with torch.no_grad():
        _, want = model.model(model.embed(features), return_att=True)
        found = model(features, coords)["attention"]
    want = want.clamp(min=0)
    torch.testing.assert_close(found, want / want.sum(), rtol=1e-4, atol=1e-6)


def test_clam_asks_the_right_tiles():
    """Which tiles count for which classifier is torchmil's; what is asked of them is written out."""
    model = make("clam", bag_weight=0.0)
    features, coords = bag()
    output = model(features, coords)
    inner = model.model
    scores, tiles = output["tiles"][0]
    for label in (0, 1):
        want = inner.compute_inst_loss(scores[None], tiles[None], torch.tensor([label]))
        torch.testing.assert_close(model.loss(output, torch.tensor([label])), want)
        order = scores.argsort(descending=True)
        top, bottom = tiles[order[:8]], tiles[order[-8:]]
        asked = [(label, top, 1), (label, bottom, 0), (1 - label, top, 0)]
        margins = [
            torch.log1p(torch.exp(1 + logits[:, 1 - answer] - logits[:, answer])).mean()
            for place, chosen, answer in asked
            for logits in [inner.inst_classifiers[place](chosen)]
        ]
        torch.testing.assert_close(want, (margins[0] + margins[1]) / 2 + margins[2])


def test_dsmil_for_two_classes_is_two_of_torchmil():
    """Each class's streams are those of torchmil's binary model with that class's weights."""
    model = make("dsmil", num_classes=3).eval()
    features, coords = bag()
    inner = model.model
    instance, per_class = inner.inst_classifier, inner.bag_classifier
    with torch.no_grad():
        output = model(features, coords)
        embedded = model.embed(features)
        for place in range(3):
            inner.inst_classifier, inner.bag_classifier = torch.nn.Linear(16, 1), torch.nn.Linear(16, 1)
            for ours, theirs in ((instance, inner.inst_classifier), (per_class, inner.bag_classifier)):
                theirs.weight.copy_(ours.weight[place : place + 1])
                theirs.bias.copy_(ours.bias[place : place + 1])
            torch.testing.assert_close(inner.predict(embedded), output["logits"][:, place])


def test_class_weights_count_for_one_bag():
    model = make("mean").eval()
    features, coords = bag()
    output = model(features, coords)
    plain = model.loss(output, torch.tensor([1]))
    torch.testing.assert_close(model.loss(output, torch.tensor([1]), torch.tensor([1.0, 3.0])), 3 * plain)


def test_max_takes_each_channel_from_the_tile_where_it_is_largest():
    model = make("max").eval()
    features = bag()[0]
    output = model(features)
    channels = model.embed(features)[0]
    torch.testing.assert_close(output["logits"][0], model.classifier(channels.amax(0)))
    predicted = int(output["logits"].argmax())
    want = torch.zeros(20)
    for channel in range(16):
        tile = int(channels[:, channel].argmax())
        want[tile] += max(0.0, float(model.classifier.weight[predicted, channel] * channels[tile, channel]))
    torch.testing.assert_close(output["attention"][0], want / want.sum(), rtol=1e-4, atol=1e-6)


@settings(deadline=None, max_examples=10)
@given(name=st.sampled_from(OURS), batch=st.integers(1, 3), tiles=st.integers(1, 30), data=st.data())
def test_any_mask(name, batch, tiles, data):
    rows = [data.draw(st.lists(st.booleans(), min_size=tiles, max_size=tiles)) for _ in range(batch)]
    mask = torch.tensor(rows)
    mask[:, 0] |= ~mask.any(dim=1)
    model = make(name).eval()
    features = torch.randn(batch, tiles, 12)
    coords = torch.randint(0, 9, (batch, tiles, 2)) * 100
    output = model(features, coords, mask)
    for b in range(batch):
        alone = model(features[b : b + 1, mask[b]], coords[b : b + 1, mask[b]])
        torch.testing.assert_close(output["logits"][b], alone["logits"][0], rtol=1e-4, atol=1e-5)


# ---- what a wrong argument says ----


@pytest.mark.parametrize(
    ("name", "words"),
    [("abmill", "did you mean abmil"), ("TransMIL", "did you mean transmil"), ("vim", "there are: mambamil, abmil")],
)
def test_an_unknown_name(name, words):
    with pytest.raises(ValueError, match=words):
        create_aggregator(name, 8, 2)


@pytest.mark.parametrize(
    ("name", "arguments", "words"),
    [
        ("mean", {"num_classes": 1}, "num_classes is 1, expected 2 or more"),
        ("mean", {"feature_dim": 0}, "feature_dim is 0"),
        ("max", {"hiden_dim": 3}, "'max' has no argument 'hiden_dim'; it has: dropout, hidden_dim"),
        ("max", {"hidden_dim": "3"}, "hidden_dim of aggregator 'max' is '3', expected a whole number"),
        ("transmil", {"heads": 3}, "3 heads do not divide hidden_dim 16"),
        ("transmil", {"depth": 1}, "depth is 1, expected 2 or more"),
        ("pama", {"model": "test_gigassl"}, "'test_gigassl' is no PAMA"),
        ("pama", {"init": 3}, "'3' is no folder with a config"),
        ("pama", {"model_args": [3]}, r"model_args are \[3\], expected names and values"),
        ("pama", {"model_args": {"depth": "2"}}, "depth of slide encoder 'test_pama' is '2'"),
        ("clam", {"bag_weight": 2}, "bag_weight is 2, expected 0 to 1"),
    ],
)
def test_arguments_that_cannot_be(name, arguments, words):
    with pytest.raises((ValueError, OSError), match=words):
        make(name, **arguments)


@pytest.mark.parametrize(
    ("features", "coords", "mask", "error", "words"),
    [
        (torch.ones(4, 12), None, None, ValueError, r"expected \(B, N, 12\)"),
        (torch.ones(1, 4, 11), None, None, ValueError, r"expected \(B, N, 12\)"),
        (torch.ones(1, 0, 12), None, None, ValueError, "a bag without tiles"),
        (torch.ones(1, 4, 12), torch.ones(1, 3, 2), None, ValueError, r"coords have shape \(1, 3, 2\)"),
        (torch.ones(1, 4, 12), None, torch.ones(1, 4), TypeError, "mask must be a bool tensor"),
        (torch.ones(1, 4, 12), None, torch.ones(1, 5).bool(), ValueError, r"mask has shape \(1, 5\)"),
        (torch.ones(2, 4, 12), None, torch.arange(2)[:, None].expand(2, 4) > 0, ValueError, "a bag without tiles"),
    ],
)
@pytest.mark.parametrize("name", ["mean", "mambamil"])
def test_inputs_that_do_not_fit(name, features, coords, mask, error, words):
    with pytest.raises(error, match=words):
        make(name)(features, coords, mask)


@pytest.mark.parametrize("name", ["smabmil", "patchgcn"])
def test_graphs_need_coords(name):
    with pytest.raises(ValueError, match=f"'{name}' needs the tiles' coords"):
        make(name)(bag()[0])


def test_without_torchmil(monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "torchmil"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torchmil", None)
    for name in OURS:
        create_aggregator(name, 8, 2)
    with pytest.raises(ImportError, match=r'pip install "ssmamba-models\[mil\]", or choose mambamil, mean or max'):
        create_aggregator("abmil", 8, 2)


def test_every_class_says_what_its_attention_is():
    for name in list_aggregators():
        assert '"attention"' in aggregator_class(name).__doc__, name
