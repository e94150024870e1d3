"""`benchmark train` on tiny models: what the steps compute, the rows, the wait for data, and what is refused."""

import json
import time

import pytest
import torch
from PIL import Image
from torch.utils.data import default_collate

from ssmamba_models.benchmark import train
from ssmamba_models.benchmark.mae import MaskedAutoencoder
from ssmamba_models.benchmark.train import TrainPlan, format_train, run_train
from ssmamba_models.benchmark.train_step import TrainStep
from ssmamba_models.ssl.mamim_views import MamimViews

pytestmark = pytest.mark.usefixtures("one_thread")

TINY = {"model": "test_ssmamba", "peer": "test_vit", "method": "mamim", "size": 64, "batch_size": 4, "workers": 0}
TINY |= {"wait_steps": 2, "rounds": 1, "threads": 1}


@pytest.fixture(scope="module")
def report(labelled_tiles):
    return run_train(TrainPlan(**TINY, data=str(labelled_tiles)))


class TestMaskedAutoencoder:
    @pytest.fixture
    def mae(self):
        torch.manual_seed(0)
        return MaskedAutoencoder("test_vit", 64, decoder_dim=64, decoder_depth=1)

    def test_is_the_decoder_that_it_says(self):
        mae = MaskedAutoencoder("test_vit", 64)
        assert len(mae.blocks) == 8
        assert mae.position.shape == (1, 1 + 16, 512)
        assert mae.kept == 4

    def test_only_visible_patches_reach_the_encoder(self, mae):
        seen = []
        mae.encoder.blocks.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].shape))
        mae(torch.randn(2, 3, 64, 64))
        assert seen == [(2, 1 + 4, 64)]

    def test_a_predictor_of_zero_has_the_loss_of_normalised_pixels(self, mae):
        torch.nn.init.zeros_(mae.to_pixels.weight)
        torch.nn.init.zeros_(mae.to_pixels.bias)
        # The mean of squares of pixels of mean 0 and (unbiased) variance 1.
        assert mae(torch.randn(2, 3, 64, 64)).item() == pytest.approx(1 - 1 / 768, abs=1e-4)

    def test_patches_return_to_their_places(self, mae):
        order = torch.stack([torch.randperm(16) for _ in range(2)])
        encoded = torch.randn(2, 1 + 4, 64)
        mae.blocks, mae.norm, mae.to_pixels = (torch.nn.Identity() for _ in range(3))
        torch.nn.init.zeros_(mae.position)
        decoded = mae._decode(encoded, order)[:, 1:]
        for image in range(2):
            assert torch.equal(decoded[image, order[image, :4]], encoded[image, 1:])
            assert torch.equal(decoded[image, order[image, 4:]], mae.mask_token[0].expand(12, -1))

    def test_every_parameter_learns(self, mae):
        mae(torch.randn(2, 3, 64, 64)).backward()
        assert [name for name, p in mae.named_parameters() if p.grad is None] == []

    def test_a_training_lowers_the_loss(self, mae):
        images = torch.nn.functional.interpolate(torch.randn(4, 3, 8, 8), size=64)
        optimizer = torch.optim.AdamW(mae.parameters(), lr=3e-3)
        losses = []
        for _ in range(40):
            optimizer.zero_grad()
            loss = mae(images)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert sum(losses[-5:]) < 0.9 * sum(losses[:5])

    @pytest.mark.parametrize(
        ("name", "size", "message"),
        [
            ("test_convnext", 64, "test_convnext"),
            ("test_vit", 72, "72 px is no multiple of the patch"),
            ("test_vit4", 64, "register tokens"),
        ],
    )
    def test_what_is_no_plain_vit_is_refused(self, name, size, message):
        with pytest.raises(ValueError, match=message):
            MaskedAutoencoder(name, size)


def test_rows_and_ratio(report):
    ours, peer = report["results"]
    assert (ours["model"], ours["method"], ours["views"]) == ("test_ssmamba", "mamim", 2)
    assert (peer["model"], peer["method"], peer["views"]) == ("test_vit", "mae", 1)
    assert ours["images_per_s"] == pytest.approx(4000 / ours["median_ms"])
    assert ours["ours_over_peer"] is None
    assert peer["ours_over_peer"] == pytest.approx(ours["images_per_s"] / peer["images_per_s"])
    assert 0 < ours["parameters_m"] < 10


def test_the_wait_is_a_part_of_the_steps(report):
    data = report["data"]
    assert (data["tiles"], data["workers"], data["steps"]) == (9, 0, 2)
    assert len(data["wait_s"]) == len(data["step_s"]) == 2
    assert data["wait_share"] == pytest.approx(sum(data["wait_s"]) / sum(data["step_s"]))
    assert 0 < data["wait_share"] < 1
    assert data["images_per_s"] == pytest.approx(8 / sum(data["step_s"]))


def test_slow_reading_is_seen(labelled_tiles, monkeypatch):
    class SlowTiles(train.SeededTiles):
        def __getitem__(self, key):
            time.sleep(0.1)
            return super().__getitem__(key)

    monkeypatch.setattr(train, "SeededTiles", SlowTiles)
    data = run_train(TrainPlan(**TINY, data=str(labelled_tiles)))["data"]
    assert min(data["wait_s"]) > 0.4


def test_report_is_json_and_the_table_fits(report):
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    table = format_train(report)
    assert f"waits for data {report['data']['wait_share']:.1%}" in table
    assert max(len(line) for line in table.splitlines() if not line.startswith("data: ")) <= 110


def test_supervised_and_self_supervised_steps_in_one_report(labelled_tiles):
    plan = {**TINY, "method": "both", "dtype": "both", "peers": ("test_convnext",), "batch_size": 2, "wait_steps": 1}
    report = run_train(TrainPlan(**plan, data=str(labelled_tiles)))
    kinds = [("test_ssmamba", "supervised"), ("test_convnext", "supervised")]
    kinds += [("test_ssmamba", "mamim"), ("test_vit", "mae")]
    assert [(row["dtype"], row["model"], row["method"]) for row in report["results"]] == [
        (dtype, *kind) for dtype in ("float32", "bfloat16") for kind in kinds
    ]
    for row in report["results"]:
        assert (row["ours_over_peer"] is None) == (row["model"] == "test_ssmamba")
        assert row["batch_size"] == 2
    assert report["data"]["dtype"] == "bfloat16"
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    assert max(len(line) for line in format_train(report).splitlines() if not line.startswith("data: ")) <= 120


def test_supervised_alone_reads_no_tiles():
    report = run_train(TrainPlan(**{**TINY, "method": "supervised", "data": "nowhere", "peers": ("test_vit",)}))
    assert [row["method"] for row in report["results"]] == ["supervised"] * 2
    assert report["data"] is None
    assert "waits for data" not in format_train(report)


def test_a_peer_that_cannot_take_the_size_has_a_reason(labelled_tiles):
    plan = {**TINY, "model": "test_vit", "peers": ("test_convnext",), "method": "supervised", "size": 72}
    report = run_train(TrainPlan(**plan))
    assert "divisible by patch size" in report["results"][0]["reason"]
    assert "not measured: " in format_train(report)


@pytest.mark.parametrize("loss", [train._MamimLoss, train._MaeLoss])
def test_a_step_moves_the_weights_of_both(loss):
    step = TrainStep(loss(TrainPlan(**TINY)))
    before = [p.detach().clone() for p in step.module.parameters()]
    tile, views = Image.new("RGB", (96, 96), (200, 120, 170)), MamimViews(64)
    step(default_collate([views(tile, torch.Generator().manual_seed(seed)) for seed in range(2)]))
    assert any((p != old).any() for p, old in zip(step.module.parameters(), before))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_step_computes_in_its_dtype(dtype):
    class Loss(torch.nn.Linear):
        def forward(self, batch):
            product = super().forward(batch)
            self.dtype = product.dtype
            return product.float().sum()

    step = TrainStep(Loss(2, 2), dtype=dtype)
    step(torch.ones(1, 2))
    assert step.module.dtype == getattr(torch, dtype)
    assert step.module.weight.dtype == torch.float32


def test_from_the_command_line_with_workers_and_synthetic_tiles(ssmamba, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "SYNTHETIC_TILES_PER_KIND", 1)
    out = tmp_path / "train.json"
    options = [f"--{key.replace('_', '-')}={value}" for key, value in {**TINY, "workers": 1}.items()]
    result = ssmamba("benchmark", "train", *options, "--json", out)
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("model")
    data = json.loads(out.read_text())["data"]
    assert (data["source"], data["tiles"], data["workers"], data["steps"]) == ("synthetic", 3, 1, 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "test_ssmambo"}, "unknown to timm .*did you mean test_ssmamba"),
        ({"model": "test_vit"}, "MAMIM needs an ssmamba encoder"),
        ({"peer": "test_convnext"}, "test_convnext"),
        ({"size": 60}, "img_size is 60, expected a multiple of cell_size"),
        ({"batch_size": 0}, "batch size must be at least 1, got 0"),
        ({"wait_steps": 0}, "wait steps must be at least 1, got 0"),
        ({"workers": -1}, "workers must be at least 0, got -1"),
        ({"dtype": "float8"}, "dtype 'float8' is unknown"),
        ({"method": "dino"}, "method 'dino' is unknown; expected one of supervised, mamim, both"),
        ({"allocator": "jemalloc"}, "allocator 'jemalloc' is unknown"),
        ({"device": "cuda:99"}, "device 'cuda:99'"),
    ],
)
def test_bad_plans_are_refused(labelled_tiles, changes, message):
    with pytest.raises(ValueError, match=message):
        run_train(TrainPlan(**{**TINY, "data": str(labelled_tiles), **changes}))


def test_a_folder_without_a_readable_tile(tmp_path):
    (tmp_path / "a.png").write_text("no image")
    with pytest.raises(ValueError, match=r"none of the 1 tiles in .* is readable"):
        run_train(TrainPlan(**TINY, data=str(tmp_path)))
