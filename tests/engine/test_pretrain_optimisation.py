"""How a pretraining learns: decay, averages, schedules, precision, optimisers, and the weights it begins with."""

import sys

import pytest
import torch
from pretrain_cases import PARTS, assert_same_weights, config_of, curve_of, run_of, weights_of
from torch import nn

from ssmamba_models.engine.optimisation import create_optimizer, create_schedule, parameter_groups
from ssmamba_models.engine.pretrain import build, select_tiles

for package in ("accelerate", "tensorboard", "yaml"):
    pytest.importorskip(package, reason="training needs the [train] extra")
pytestmark = pytest.mark.usefixtures("one_thread")


class TestOptimisation:
    def test_ema_is_what_is_exported(self, labelled_tiles, tmp_path):
        run_of(labelled_tiles, tmp_path / "run", ema_decay=0.999)
        state = torch.load(tmp_path / "run" / "checkpoints" / "step-00000006.pt", weights_only=True)
        exported = weights_of(tmp_path / "run")["stem.conv1.weight"]
        assert torch.equal(exported, state["ema"]["encoder.stem.conv1.weight"])
        assert not torch.equal(exported, state["module"]["encoder.stem.conv1.weight"])

    def test_what_is_decayed(self, labelled_tiles):
        config = config_of(labelled_tiles)
        module, _ = build(config, select_tiles(config))
        groups = parameter_groups(module, 0.05)
        names = {id(parameter): name for name, parameter in module.named_parameters()}
        decayed = {names[id(p)] for group in groups if group["weight_decay"] for p in group["params"]}
        spared = {names[id(p)] for group in groups if not group["weight_decay"] for p in group["params"]}
        assert {f"encoder.{name}" for name in module.encoder.no_weight_decay()} <= spared
        assert {"mask_token", "encoder.stem.conv1.bias", "decoder.norm.weight"} <= spared
        assert "decoder.blocks.0.dms.scans.0.A_log" in spared
        assert {"encoder.stem.conv1.weight", "decoder.to_pixels.weight"} <= decayed
        frozen = {name for name, parameter in module.named_parameters() if not parameter.requires_grad}
        assert decayed | spared | frozen == set(names.values())

    def test_muon_turns_matrices_alone(self, labelled_tiles):
        config = config_of(labelled_tiles, optimizer="muon", model="ssmamba_tiny")
        module, _ = build(config, select_tiles(config))
        groups = create_optimizer(config, parameter_groups(module, 0.05)).param_groups
        names = {id(parameter): name for name, parameter in module.named_parameters()}
        turned = {names[id(p)] for group in groups if not group["use_fallback"] for p in group["params"]}
        wanted = {"encoder.stem.conv2.weight", "encoder.stages.2.blocks.0.mlp.fc1.weight", "decoder.join.weight"}
        assert wanted <= turned
        rest = ("norm", "bias", "lpr", "A_log", "beta", ".D", "mask_token")
        assert not [name for name in turned if any(part in name for part in rest)]
        assert all(group["weight_decay"] for group in groups if not group["use_fallback"])
        trained = {id(p) for p in module.parameters() if p.requires_grad}
        assert trained == {id(p) for group in groups for p in group["params"]}

    def test_muon_moves_a_matrix_alike_in_all_directions(self, labelled_tiles):
        """And as far as AdamW would: 0.2 lr for each entry, root mean square."""
        torch.manual_seed(0)
        weight = nn.Parameter(torch.zeros(32, 64))
        config = config_of(labelled_tiles, optimizer="muon", lr=0.01, weight_decay=0.0)
        optimizer = create_optimizer(config, [{"params": [weight], "weight_decay": 0.0}])
        few = torch.randn(32, 64) * torch.logspace(0, -2, 32)[:, None]  # a gradient of few strong directions
        weight.grad = few
        optimizer.step()
        values = torch.linalg.svdvals(weight.detach())
        assert values[-1] / values[0] > 0.3 > 10 * torch.linalg.svdvals(few)[-1] / torch.linalg.svdvals(few)[0]
        assert weight.square().mean().sqrt().item() == pytest.approx(0.2 * 0.01, rel=0.3)

    def test_muon_goes_on_where_it_was(self, labelled_tiles, tmp_path):
        """Stopped after the first epoch and resumed, it gives the unbroken run's numbers."""
        muon = {"optimizer": "muon", "reconstruct_every": None}
        run_of(labelled_tiles, tmp_path / "whole", **muon)
        run_of(labelled_tiles, tmp_path / "parts", **muon, keep_checkpoints=9)
        for name in ("step-00000004.pt", "step-00000006.pt"):
            (tmp_path / "parts" / "checkpoints" / name).unlink()
        run_of(labelled_tiles, tmp_path / "parts", **muon, keep_checkpoints=9, resume=True)
        assert curve_of(tmp_path / "parts") == curve_of(tmp_path / "whole")
        assert_same_weights(tmp_path / "parts", tmp_path / "whole")

    def test_a_timm_without_muon_is_named(self, labelled_tiles, monkeypatch):
        monkeypatch.delattr("timm.optim.muon")
        monkeypatch.setitem(sys.modules, "timm.optim.muon", None)
        with pytest.raises(ValueError, match="newer timm"):
            create_optimizer(config_of(labelled_tiles, optimizer="muon"), [{"params": [nn.Parameter(torch.zeros(1))]}])

    def test_schedule(self, labelled_tiles):
        config = config_of(labelled_tiles, epochs=10, warmup_epochs=2, min_lr=1e-5)
        optimizer = create_optimizer(config, [{"params": [nn.Parameter(torch.zeros(1))], "lr_scale": 0.5}])
        schedule = create_schedule(config, optimizer, steps_per_epoch=5)
        rates = []
        for step in range(51):
            rates.append(optimizer.param_groups[0]["lr"] / 0.5)
            schedule.step_update(step + 1)
        assert rates[0] == pytest.approx(1e-4)
        assert rates[10] == pytest.approx(1e-3)
        assert rates[:11] == sorted(rates[:11])
        assert rates[10:] == sorted(rates[10:], reverse=True)
        assert rates[30] == pytest.approx((1e-3 + 1e-5) / 2)
        assert rates[50] == pytest.approx(1e-5)

    def test_lr_grows_with_the_batch(self, labelled_tiles):
        assert config_of(labelled_tiles, lr=None, batch_size=512).peak_lr == pytest.approx(3e-4)
        assert config_of(labelled_tiles, batch_size=512).peak_lr == 1e-3

    def test_bf16(self, unbroken, labelled_tiles, tmp_path):
        run_of(labelled_tiles, tmp_path / "run", precision="bf16", epochs=1)
        coarse, exact = curve_of(tmp_path / "run", PARTS)[0], curve_of(unbroken[0], PARTS)[0]
        assert coarse != exact
        assert coarse == pytest.approx(exact, rel=0.02)
        assert weights_of(tmp_path / "run")["stem.conv1.weight"].dtype == torch.float32

    def test_clipping(self, labelled_tiles, tmp_path):
        run_of(labelled_tiles, tmp_path / "free", clip_grad=None, epochs=1)
        run_of(labelled_tiles, tmp_path / "clipped", clip_grad=1e-6, epochs=1)
        assert curve_of(tmp_path / "free")[0] == pytest.approx(curve_of(tmp_path / "clipped")[0])
        assert curve_of(tmp_path / "free")[1] != pytest.approx(curve_of(tmp_path / "clipped")[1], rel=1e-6)


class TestInit:
    def test_a_run(self, unbroken, labelled_tiles):
        config = config_of(labelled_tiles, init=str(unbroken[0]), seed=5)
        module, _ = build(config, select_tiles(config))
        assert torch.equal(module.encoder.stem.conv1.weight, weights_of(unbroken[0])["stem.conv1.weight"])

    @pytest.mark.parametrize(
        ("init", "error", "message"),
        [("nowhere", FileNotFoundError, "init is 'nowhere'"), ("pretrained", ValueError, "no published weights")],
    )
    def test_impossible(self, labelled_tiles, tmp_path, init, error, message):
        with pytest.raises(error, match=message):
            run_of(labelled_tiles, tmp_path / "run", init=init)
        assert not (tmp_path / "run").exists()
