"""SGCL: its losses mean what they say, and any timm encoder will do."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from sgcl_cases import grid_manifest, make_batch, make_sgcl

pytestmark = pytest.mark.usefixtures("one_thread")


def positives_of(sgcl, batch):
    """(what `_propagate` found, the neighbours) of each tile, as sets."""
    near, near_valid = sgcl.neighbors.query(batch["index"])
    queries = F.normalize(torch.randn(len(batch["index"]), 128), dim=1)
    alike, valid = sgcl._propagate(queries, batch["index"], near, near_valid)
    return [(set(a[v].tolist()), set(n[w].tolist())) for a, v, n, w in zip(alike, valid, near, near_valid)]


def test_the_ramp():
    sgcl = make_sgcl(inter=False, inner=False)
    assert [round(sgcl.ramp(epoch), 3) for epoch in (0, 5, 10, 11, 99)] == [0.007, 0.287, 1, 1, 1]
    short = make_sgcl(inter=False, inner=False, ramp_epochs=2)
    assert [round(short.ramp(epoch), 3) for epoch in range(4)] == [0.007, 0.287, 1, 1]
    assert make_sgcl(inter=False, inner=False, ramp_epochs=0).ramp(0) == 1


@pytest.mark.parametrize("epoch", [0, 5, 12])
def test_the_loss_is_the_sum_of_its_parts(epoch):
    sgcl = make_sgcl()
    sgcl.start_step(epoch, 40)
    out = sgcl(make_batch())
    assert out["spatial_weight"].item() == pytest.approx(sgcl.ramp(epoch))
    parts = out["loss_self"] + sgcl.ramp(epoch) * out["loss_spatial"] + out["loss_crop"]
    assert out["loss"].item() == pytest.approx(parts.item(), rel=1e-6)
    assert all(value.ndim == 0 and value.isfinite() for value in out.values())
    assert min(out[name].item() for name in ("loss_self", "loss_spatial", "loss_crop")) > 0
    assert 1 < out["feature_rank"].item() <= 4


def test_self_loss_is_instance_discrimination():
    sgcl, batch = make_sgcl(intra=False, inter=False, inner=False), make_batch()
    rows = sgcl.bank.rows.clone()
    out = sgcl(batch)
    with torch.no_grad():
        logits = sgcl._project(sgcl._pool(batch["image"])) @ rows.T / 0.2  # all 72 tiles are negatives
    assert out["loss_self"].item() == pytest.approx(F.cross_entropy(logits, batch["index"]).item(), rel=1e-4)
    assert out["loss"].item() == out["loss_self"].item()
    assert out["loss_spatial"] == out["loss_crop"] == out["positives"] == 0


def test_noise_in_the_banks_does_not_count():
    sgcl, batch = make_sgcl(seen=False, ramp_epochs=0), make_batch()
    first = sgcl(batch)
    assert all(first[name] == 0 for name in ("loss", "loss_self", "loss_spatial", "loss_crop", "propagated"))
    first["loss"].backward()
    assert all(p.grad.isfinite().all() for p in sgcl.parameters() if p.grad is not None)
    beside = sgcl.eval()(make_batch(index=(1, 2, 6, 8)))  # neighbours of what was looked at, themselves new
    assert beside["positives"] > 0
    assert beside["loss"] == beside["loss_spatial"] == 0
    second = sgcl.eval()(batch)
    with torch.no_grad():
        logits = sgcl._project(sgcl._pool(batch["image"])) @ sgcl.bank.rows[batch["index"]].T / 0.2
    # Of 72 tiles there are four to be told apart.
    assert second["loss_self"].item() == pytest.approx(F.cross_entropy(logits, torch.arange(4)).item(), rel=1e-4)


def test_crop_loss_tells_the_corner_of_other_tiles():
    sgcl, batch = make_sgcl(intra=False, inter=False), make_batch()
    rows = sgcl.corners.rows.clone().view(72, 4, -1)
    out = sgcl(batch)
    drawn = np.random.default_rng([0, 4, 0]).permutation(72)[:18]
    with torch.no_grad():
        crops = sgcl._project(sgcl._pool(batch["crops"].flatten(0, 1))).view(4, 4, -1)
    losses = []
    for tile, queries in zip(batch["index"].tolist(), crops):
        others = rows[[other for other in drawn if other != tile]].flatten(0, 1)
        for corner, query in enumerate(queries):
            logits = torch.cat([rows[tile, corner, None], others]) @ query / 0.2
            losses.append(F.cross_entropy(logits, torch.tensor(0)).item())
    assert out["loss_crop"].item() == pytest.approx(np.mean(losses), rel=1e-4)


def test_spatial_positives_are_of_the_own_slide():
    sgcl, batch = make_sgcl(), make_batch()
    sgcl.start_step(0, 0)
    for tile, (_, near) in zip(batch["index"].tolist(), positives_of(sgcl, batch)):
        assert near
        assert all(other // 36 == tile // 36 for other in near)


def test_propagation_reaches_other_slides_or_those_alone():
    both, other = make_sgcl(), make_sgcl(exclude_own_slide=True)
    batch = make_batch(index=range(72))
    for sgcl in (both, other):
        sgcl.start_step(0, 0)
    crossing = [
        [found // 36 != tile // 36 for tile, (alike, _) in enumerate(positives_of(sgcl, batch)) for found in alike]
        for sgcl in (both, other)
    ]
    assert any(crossing[0])
    assert not all(crossing[0])
    assert crossing[1]
    assert all(crossing[1])
    assert all(tile not in alike for tile, (alike, _) in enumerate(positives_of(both, batch)))


def test_isolated_tiles_fall_back_to_the_self_term():
    far = SimpleNamespace(slides=["a"] * 40, x=10 * np.arange(40), y=np.zeros(40, dtype=int))
    sgcl = make_sgcl(manifest=far, inner=False)
    out = sgcl(make_batch(index=(0, 3, 5, 9)))
    assert out["loss_spatial"] == out["positives"] == out["propagated"] == 0
    assert out["loss"].item() == out["loss_self"].item()
    out["loss"].backward()
    assert all(p.grad.isfinite().all() for p in sgcl.parameters() if p.grad is not None)


def test_what_lies_near_or_is_alike_is_no_negative(monkeypatch):
    for intra in (True, False):
        sgcl, batch, seen = make_sgcl(intra=intra), make_batch(), []
        sample = sgcl.sampler.sample

        def spy(*arguments, sample=sample, seen=seen):
            drawn = sample(*arguments)
            seen.append((arguments[2], arguments[3], drawn[0]))
            return drawn

        monkeypatch.setattr(sgcl.sampler, "sample", spy)
        sgcl(batch)
        (known, valid, drawn), = seen
        near, near_valid = sgcl.neighbors.query(batch["index"])
        for row, tile in enumerate(batch["index"].tolist()):
            excluded = set(known[row][valid[row]].tolist())
            assert {tile, *near[row][near_valid[row]].tolist()} <= excluded
            assert not excluded & set(drawn[row].tolist())


def test_hard_negatives_get_no_gradient_through_their_logits():
    """Only the positives pull: the spatial gradient lies in the span of the tiles that are positives."""
    sgcl, batch = make_sgcl(inter=False, inner=False), make_batch(index=(0, 5))
    queries = F.normalize(torch.randn(2, 128), dim=1).requires_grad_()
    units = F.normalize(torch.randn(2, sgcl.features.rows.shape[1]), dim=1)
    loss, _ = sgcl._spatial_loss(queries, units, batch["index"], np.random.default_rng(0))
    loss.backward()
    near, valid = sgcl.neighbors.query(batch["index"])
    for row in range(2):
        basis = sgcl.bank.rows[near[row][valid[row]]].T
        rest = queries.grad[row] - basis @ torch.linalg.lstsq(basis, queries.grad[row, :, None]).solution[:, 0]
        assert rest.norm() < 1e-4 * queries.grad[row].norm()


@pytest.mark.parametrize("switch", ["intra", "inter", "inner"])
def test_each_switch_leaves_one_thing_out(switch):
    whole, without = make_sgcl(), make_sgcl(**{switch: False})
    batch = make_batch(index=range(0, 72, 3))
    out, less = whole(batch), without(batch)
    assert less["loss_self"].item() == pytest.approx(out["loss_self"].item(), rel=1e-5)
    assert (less["loss_crop"].item() == 0) == (switch == "inner")
    assert (less["propagated"].item() == 0) == (switch == "inter")
    assert (less["loss_spatial"].item() == pytest.approx(out["loss_spatial"].item(), rel=1e-5)) == (switch == "inner")
    assert less["positives"].item() <= out["positives"].item()
    if switch == "intra":
        assert less["positives"].item() == less["propagated"].item() > 0
    assert ("corners.rows" in without.state_dict()) == (switch != "inner")
    assert ("miner.labels" in without.state_dict()) == (switch != "inter")


def test_banks_follow_in_training_alone():
    sgcl, batch = make_sgcl(), make_batch()
    before = {name: value.clone() for name, value in sgcl.state_dict().items()}
    sgcl.start_step(0, 0)
    sgcl.eval()(batch)
    banks = {"bank.rows": [0, 7, 40, 71], "features.rows": [0, 7, 40, 71]}
    banks["corners.rows"] = [4 * tile + corner for tile in banks["bank.rows"] for corner in range(4)]
    assert all(torch.equal(sgcl.state_dict()[name], before[name]) for name in banks)
    sgcl.train()(batch)
    for name, rows in banks.items():
        changed = (sgcl.state_dict()[name] != before[name]).any(1).nonzero()[:, 0].tolist()
        assert changed == rows


def test_draws_are_of_the_seed_and_the_step():
    batch = make_batch()

    def loss(seed=0, step=3, before=()):
        sgcl = make_sgcl(negatives=20, hard_negatives=5, ramp_epochs=0)
        sgcl.seed = seed
        for earlier in before:
            sgcl.start_step(0, earlier)
            sgcl.eval()(batch)
        sgcl.start_step(0, step)
        return sgcl.eval()(batch)["loss"].item()

    assert loss() == loss(before=(0, 1, 2))
    assert len({loss(), loss(step=4), loss(seed=1)}) == 3


def test_an_epoch_clusters_once():
    sgcl = make_sgcl(inner=False)
    epochs = []
    fit = sgcl.miner.fit
    sgcl.miner.fit = lambda bank, epoch: (epochs.append(epoch), fit(bank, epoch))
    for step in range(6):
        sgcl.start_step(step // 2, step)
    assert epochs == [0, 1, 2]
    resumed = make_sgcl(inner=False)
    resumed.load_state_dict(sgcl.state_dict())
    resumed.miner.fit = None  # would fail: in mid-epoch the clusters of the checkpoint hold
    resumed.start_step(2, 6)
    assert torch.equal(resumed.miner.labels, sgcl.miner.labels)


@pytest.mark.parametrize(
    ("model", "model_args", "img_size", "enlarged"),
    [
        ("test_ssmamba", {}, 64, False),
        ("resnet18", {}, 64, False),
        ("vit_tiny_patch16_224", {"img_size": 64}, 64, True),
        ("vit_tiny_patch16_224", {"img_size": 64, "dynamic_img_size": True}, 64, False),
    ],
)
def test_any_timm_encoder(model, model_args, img_size, enlarged):
    sgcl, batch = make_sgcl(model, model_args=model_args), make_batch(img_size=img_size)
    sizes = []
    features = sgcl.encoder.forward_features
    sgcl.encoder.forward_features = lambda x: (sizes.append((x.shape[0], x.shape[-1])), features(x))[1]
    sgcl(batch)["loss"].backward()
    assert sizes[0] == (4, img_size)
    assert sizes[-1] == (16, img_size if enlarged else 32)
    assert sgcl.training
    assert all(module.training for module in sgcl.encoder.modules())
    silent = [name for name, p in sgcl.named_parameters() if p.requires_grad and p.grad is None]
    assert silent == []


@pytest.mark.slow
def test_vit_small_of_224():
    sgcl = make_sgcl("vit_small_patch16_224")
    out = sgcl(make_batch(index=(1, 2), img_size=224, crop_size=96))
    assert out["loss"].isfinite()


def test_the_encoder_stays_a_plain_timm_model():
    sgcl = make_sgcl()
    sgcl(make_batch())["loss"].backward()
    plain = timm.create_model("test_ssmamba", num_classes=0)
    plain.load_state_dict(sgcl.encoder.state_dict())
    image = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(plain.eval()(image), sgcl.encoder.eval()(image))


def test_a_classifier_plays_no_part():
    from ssmamba_models.ssl.sgcl import SGCL

    torch.manual_seed(0)
    sgcl = SGCL(timm.create_model("test_ssmamba", num_classes=7), grid_manifest(), inter=False)
    sgcl(make_batch())["loss"].backward()
    assert all(p.grad is None and not p.requires_grad for p in sgcl.encoder.get_classifier().parameters())


def test_what_ddp_leaves_alone_are_banks_clusters_and_places():
    sgcl = make_sgcl("resnet18")
    left = set(sgcl._ddp_params_and_buffers_to_ignore)
    buffers = {name for name, _ in sgcl.named_buffers()}
    assert left == {name for name in buffers if not name.startswith("encoder.")}
    assert {"bank.rows", "corners.rows", "features.rows", "miner.labels"} <= left
    assert {"neighbors.place", "neighbors.order"} & set(sgcl.state_dict()) == set()
    assert "encoder.bn1.running_mean" in buffers


def test_it_is_computed_in_float32_under_autocast():
    batch = make_batch()
    exact = make_sgcl().eval()(batch)
    with torch.autocast("cpu", torch.bfloat16):
        coarse = make_sgcl().eval()(batch)
    assert all(value.dtype == torch.float32 for value in coarse.values())
    assert coarse["loss"].item() == pytest.approx(exact["loss"].item(), rel=0.02)


def test_it_learns():
    sgcl, batch = make_sgcl(ramp_epochs=0), make_batch(index=range(0, 72, 9))
    optimizer = torch.optim.SGD([p for p in sgcl.parameters() if p.requires_grad], 0.02, momentum=0.9)
    losses = []
    for step in range(15):
        sgcl.start_step(step // 5, step)
        out = sgcl(batch)
        out["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(out["loss_self"].item())
    assert losses[-1] < 0.7 * max(losses[:5])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"negatives": 73}, "negatives is 73, but there are 72 tiles"),
        ({"hard_negatives": 100}, "hard_negatives is 100, but there are 72 tiles"),
        ({"negatives": 0}, "negatives is 0"),
        ({"dim": 0}, "dim is 0"),
        ({"ramp_epochs": -1}, "ramp_epochs is -1"),
        ({"temperature": 0.0}, "temperature is 0"),
        ({"spatial_temperature": math.nan}, "temperature is nan"),
        ({"momentum": 1.0}, "momentum is 1"),
        ({"radius": 1.0}, "radius is 1"),
        ({"kmeans": "magic"}, "sklearn, faiss"),
        ({"manifest": grid_manifest(1, 1, 1)}, "there is 1; expected 2 or more"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_sgcl(**arguments)


def test_other_modules_are_no_encoders():
    from ssmamba_models.ssl.sgcl import SGCL

    with pytest.raises(ValueError, match="needs a timm model as encoder, not Linear"):
        SGCL(torch.nn.Linear(3, 4), grid_manifest())


def test_a_batch_that_does_not_fit_is_refused():
    sgcl, batch = make_sgcl(inter=False), make_batch()
    with pytest.raises(ValueError, match="the batch has no index, but image, crops"):
        sgcl({name: batch[name] for name in ("image", "crops")})
    with pytest.raises(ValueError, match=r"index \(3,\)"):
        sgcl({**batch, "index": batch["index"][:3]})
    with pytest.raises(ValueError, match="crops have shape"):
        sgcl({**batch, "crops": batch["crops"][:, :3]})
    with pytest.raises(ValueError, match="global_pool"):
        make_sgcl("resnet18", model_args={"global_pool": ""}, inter=False)(batch)
