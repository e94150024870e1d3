"""Giga-SSL: what its loss means, on one process and on two, and how views are drawn."""

from __future__ import annotations

import math

import pytest
import torch
import torch.multiprocessing as multiprocessing
import torch.nn.functional as F

from ssmamba_models.slide.gigassl_ssl import GigaSSL, nt_xent
from ssmamba_models.slide.gigassl_views import GigaSSLViews
from ssmamba_models.slide.slide_encoders import create_slide_encoder
from ssmamba_models.slide.slide_tiles import SlideTiles

pytestmark = pytest.mark.usefixtures("one_thread")

DIM = 6


def tiles(count: int = 30, seed: int = 0, bags: int = 0) -> SlideTiles:
    generator = torch.Generator().manual_seed(seed)

    def some(n):
        return torch.randn(n, DIM, generator=generator), torch.randint(20, (n, 2), generator=generator).float()

    return SlideTiles(*some(count), bags=tuple(some(8) for _ in range(bags)) or None)


def make_batch(slides: int = 4, **arguments) -> dict[str, torch.Tensor]:
    drawn = [GigaSSLViews(**arguments)(tiles(seed=i), torch.Generator().manual_seed(i)) for i in range(slides)]
    return {name: torch.stack([views[name] for views in drawn]) for name in drawn[0]}


def make(**arguments) -> GigaSSL:
    torch.manual_seed(0)
    return GigaSSL(create_slide_encoder("test_gigassl", DIM), **arguments)


def test_nt_xent_is_written_out():
    z = torch.randn(6, 5)
    unit = z / z.norm(dim=1, keepdim=True)
    wanted = 0.0
    for i in range(6):
        scores = {k: math.exp(float(unit[i] @ unit[k]) / 0.1) for k in range(6) if k != i}
        wanted -= math.log(scores[i ^ 1] / sum(scores.values())) / 6
    assert nt_xent(z, 0.1).item() == pytest.approx(wanted, rel=1e-4)


def test_views_that_agree_cost_less():
    pairs = torch.randn(4, 5).repeat_interleave(2, 0)
    assert nt_xent(pairs, 0.05) < 0.1 < nt_xent(pairs[[0, 2, 4, 6, 1, 3, 5, 7]], 0.05)


def test_the_loss_trains_every_parameter():
    model = make()
    out = model(make_batch())
    assert set(out) == {"loss", "feature_cosine", "feature_rank"}
    assert not out["feature_rank"].requires_grad
    out["loss"].backward()
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert all(grad is not None and grad.isfinite().all() for grad in grads.values())
    assert all(grad.any() for name, grad in grads.items() if not name.startswith("projector") or "weight" in name)


def test_a_few_steps_find_the_slides_again():
    model, batch = make(temperature=0.1), make_batch(8)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = model(batch)["loss"]
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_under_bf16_the_loss_is_nearly_the_same():
    model, batch = make().eval(), make_batch()
    with torch.autocast("cpu", torch.bfloat16):
        rough = model(batch)["loss"]
    assert rough.dtype == torch.float32
    torch.testing.assert_close(rough, model(batch)["loss"], rtol=0.2, atol=0.2)


def _train(process: int, processes: int, store: str, path: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=process, world_size=processes
    )
    model = torch.nn.parallel.DistributedDataParallel(make())
    batch = {name: values[process * 2 : process * 2 + 2] for name, values in make_batch(4).items()}
    out = model(batch)
    out["loss"].backward()
    loss = out["loss"].detach()
    torch.distributed.all_reduce(loss)
    if process == 0:
        grads = {name: parameter.grad for name, parameter in model.module.named_parameters()}
        torch.save({"loss": loss / processes, "grads": grads, "state": model.module.state_dict()}, path)
    torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="torch has no gloo")
def test_two_processes_are_one_with_the_whole_batch(tmp_path):
    multiprocessing.spawn(_train, (2, str(tmp_path / "store"), str(tmp_path / "out")), nprocs=2)
    found, model = torch.load(tmp_path / "out"), make()
    loss = model(make_batch(4))["loss"]
    loss.backward()
    torch.testing.assert_close(found["loss"], loss.detach())
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    torch.testing.assert_close(found["grads"], grads, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(found["state"], model.state_dict())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [({"temperature": 0}, "temperature is 0"), ({"temperature": math.nan}, "temperature"), ({"out_dim": 0}, "out_dim")],
)
def test_arguments_that_cannot_be(arguments, words):
    with pytest.raises(ValueError, match=words):
        make(**arguments)


def test_batches_that_do_not_fit():
    with pytest.raises(ValueError, match="over 1 slide has nothing to choose from; use a larger --batch-size"):
        make()(make_batch(1))
    with pytest.raises(ValueError, match="two views"):
        make()({name: values[:, 0] for name, values in make_batch().items()})


class TestViews:
    def test_the_generator_alone_decides(self):
        views, slide = GigaSSLViews(), tiles(bags=3)
        torch.manual_seed(1)
        first = views(slide, torch.Generator().manual_seed(7))
        torch.manual_seed(2)
        again = views(slide, torch.Generator().manual_seed(7))
        assert all(torch.equal(first[name], again[name]) for name in first)
        assert first["features"].shape == (2, 5, DIM)
        assert first["grid"].shape == (2, 5, 2)
        assert not torch.equal(first["features"][0], first["features"][1])

    def test_a_view_shows_one_bag(self):
        slide, generator = tiles(bags=3), torch.Generator().manual_seed(0)
        shown = set()
        for _ in range(20):
            for view in GigaSSLViews(tiles=4)(slide, generator)["features"]:
                owners = {i for row in view for i, (bag, _) in enumerate(slide.bags) if (bag == row).all(1).any()}
                assert len(owners) == 1
                shown |= owners
        assert shown == {0, 1, 2}

    @pytest.mark.parametrize(("bags", "shared_aug"), [(0, True), (3, False)])
    def test_without_bags_it_shows_plain_tiles(self, bags, shared_aug):
        slide = tiles(bags=bags)
        view = GigaSSLViews(shared_aug=shared_aug)(slide, torch.Generator().manual_seed(0))["features"]
        assert all((slide.features == row).all(1).any() for row in view.flatten(0, 1))

    def test_places_are_turned_mirrored_and_scaled(self):
        slide = SlideTiles(torch.arange(3.0)[:, None], torch.tensor([[100.0, 50], [103, 50], [100, 54]]))
        generator, seen = torch.Generator().manual_seed(0), []
        views = GigaSSLViews(tiles=40, scale=(0.7, 1.3))
        for _ in range(50):
            out = views(slide, generator)
            for features, grid in zip(out["features"], out["grid"]):
                place = {int(f): g for f, g in zip(features[:, 0], grid)}
                a, b = place[1] - place[0], place[2] - place[0]
                # grid = diag(s) R p: what R has of rows of length 1 shows the factors.
                matrix = torch.stack((a / 3, b / 4), dim=1)
                sizes = matrix.norm(dim=1)
                assert ((sizes > 0.699) & (sizes < 1.301)).all()
                rotation = matrix / sizes[:, None]
                torch.testing.assert_close(rotation @ rotation.T, torch.eye(2), atol=1e-4, rtol=0)
                seen.append(float(torch.det(rotation)))
        assert 20 < sum(det > 0 for det in seen) < 80

    def test_one_tile(self):
        views = GigaSSLViews()(tiles(1), torch.Generator().manual_seed(0))
        assert (views["features"] == views["features"][0, 0]).all()

    @pytest.mark.parametrize("arguments", [{"tiles": 0}, {"scale": (1.3, 0.7)}, {"scale": (0, 1)}, {"scale": (1,)}])
    def test_arguments_that_cannot_be(self, arguments):
        with pytest.raises(ValueError, match=next(iter(arguments))):
            GigaSSLViews(**arguments)


@pytest.mark.parametrize(
    ("features", "grid", "bags", "words"),
    [
        (torch.ones(0, 3), torch.ones(0, 2), None, "N 1 or more"),
        (torch.ones(2, 3), torch.ones(3, 2), None, r"grid has shape \(3, 2\)"),
        (torch.ones(2, 3).half(), torch.ones(2, 2), None, r"features are torch.float16"),
        (torch.ones(2, 3), torch.ones(2, 2), (), "bags are empty"),
    ],
)
def test_slides_that_cannot_be(features, grid, bags, words):
    with pytest.raises(ValueError, match=words):
        SlideTiles(features, grid, bags)


def test_the_cosine_of_the_loss_is_that_of_torch():
    z = torch.randn(4, 3)
    cosines = F.cosine_similarity(z[:, None], z[None], dim=-1) / 0.05
    cosines.fill_diagonal_(-torch.inf)
    torch.testing.assert_close(nt_xent(z, 0.05), F.cross_entropy(cosines, torch.tensor([1, 0, 3, 2])))
