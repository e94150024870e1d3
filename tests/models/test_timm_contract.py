"""What timm's own tests ask of every registered model, asked of ours."""

from __future__ import annotations

import pickle
from copy import deepcopy

import pytest
import timm
import torch
from model_cases import image, small
from timm.models import group_parameters, load_checkpoint, save_for_hf
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3

import ssmamba_models

MODELS = ("ssmamba_tiny", "ssmamba_small", "ssmamba_base", "test_ssmamba")
DIMS = (16, 24, 32, 48)
EVERY = pytest.mark.parametrize("name", MODELS)
LIGHT = pytest.mark.parametrize("name", ["test_ssmamba", "ssmamba_tiny"])


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    """With a classifier of 42; not to be altered."""
    return small(num_classes=42)


# ---- the registry ----


def test_the_models_are_registered_with_timm():
    assert ssmamba_models.list_models() == sorted(MODELS)
    assert set(MODELS) <= set(timm.list_models())
    assert sorted(timm.list_models(module="ssmamba")) == sorted(MODELS)
    assert ssmamba_models.list_models("*small*") == ["ssmamba_small"]
    assert ssmamba_models.list_models("resnet*") == []


def test_create_model_is_timms():
    torch.manual_seed(0)
    ours = ssmamba_models.create_model("test_ssmamba", num_classes=5, drop_path_rate=0.1)
    theirs = small(num_classes=5, drop_path_rate=0.1)
    assert type(ours) is type(theirs)
    assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), theirs.state_dict().values()))


@pytest.mark.parametrize("name", ["ssmamba_huge", "resnet18", "", "ssmamba_small.no_such_tag"])
def test_an_unknown_model_is_named_with_those_that_exist(name):
    kwargs = {"pretrained": True} if "." in name else {}
    with pytest.raises((ValueError, RuntimeError)) as error:
        ssmamba_models.create_model(name, **kwargs)
    assert all(part in str(error.value) for part in name.split("."))
    if not kwargs:
        assert "ssmamba_small" in str(error.value)


@EVERY
def test_the_default_configuration_is_complete(name):
    model = timm.create_model(name, num_classes=7, device="meta")
    cfg = model.default_cfg
    assert cfg["architecture"] == name
    for key in ("url", "num_classes", "input_size", "pool_size", "crop_pct", "interpolation", "mean", "std"):
        assert key in cfg
    names = set(model.state_dict())
    for key in ("classifier", "first_conv"):
        assert isinstance(cfg[key], str)
        assert f"{cfg[key]}.weight" in names
    assert f"{cfg['classifier']}.weight" not in timm.create_model(name, num_classes=0, device="meta").state_dict()
    assert model.get_submodule(cfg["first_conv"]).weight.shape[1] == 3
    config = timm.data.resolve_model_data_config(model)
    assert config["input_size"] == cfg["input_size"]
    assert cfg["origin_url"].startswith("https://")
    assert cfg["paper_ids"] == "arXiv:2604.15711"
    assert "SSMamba" in cfg["description"]
    assert ("MAMIM" in cfg["description"]) == bool(cfg.get("hf_hub_id"))


@EVERY
def test_the_head_can_be_changed_or_left_out(name):
    """pool_size is that of the feature map; every way to have no classifier gives what it says."""
    model = timm.create_model(name, num_classes=7, device="meta").eval()
    chans, height, width = model.default_cfg["input_size"]
    x = torch.zeros(1, chans, height, width, device="meta")
    features = model.forward_features(x)
    assert model.output_fmt == "NHWC"
    assert tuple(features.shape[1:3]) == model.default_cfg["pool_size"]
    assert features.shape[3] == model.num_features
    assert model(x).shape == (1, 7)
    assert model.forward_head(features, pre_logits=True).shape == (1, model.head_hidden_size)

    model.reset_classifier(0)
    assert model.num_classes == 0
    assert model(x).shape == (1, model.num_features)
    model.reset_classifier(0, "")
    assert model(x).shape == (1, *model.default_cfg["pool_size"], model.num_features)
    model.reset_classifier(11, "max")
    assert model(x).shape == (1, 11)

    assert timm.create_model(name, num_classes=0, device="meta")(x).shape == (1, model.num_features)
    for kwargs in ({"num_classes": 0, "global_pool": ""}, {"num_classes": 5, "global_pool": ""}):
        y = timm.create_model(name, **kwargs, device="meta")(x)
        assert y.shape[1:3] == model.default_cfg["pool_size"]
        assert y.shape[3] == (kwargs["num_classes"] or model.num_features)


# ---- forward and backward ----


@LIGHT
def test_forward(name):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10).eval()
    with torch.inference_mode():
        y = model(image(batch=1))
    assert y.shape == (1, 10)
    assert y.isfinite().all()
    assert y.std() > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ssmamba_small", "ssmamba_base"])
def test_forward_of_the_large_models(name):
    torch.manual_seed(0)
    with torch.inference_mode():
        y = timm.create_model(name).eval()(image(batch=1))
    assert y.shape == (1, {"ssmamba_small": 512, "ssmamba_base": 768}[name])
    assert y.isfinite().all()


@LIGHT
def test_every_parameter_gets_a_gradient(name):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=42).train()
    y = model(image(batch=2))
    assert y.shape == (2, 42)
    y.square().mean().backward()
    for key, p in model.named_parameters():
        assert p.grad is not None, f"no gradient for {key}"
        assert p.grad.isfinite().all(), key
    # Those of the recurrence are not only there, they are not zero.
    for key, p in model.named_parameters():
        if key.rsplit(".", 1)[-1] in ("dt_bias", "A_log", "B_bias", "D"):
            assert p.grad.any(), key


@pytest.mark.parametrize("pool", ["avg", "max", "avgmax", "catavgmax", ""])
def test_global_pool(pool):
    model = small(num_classes=5, global_pool=pool)
    x = image()
    with torch.no_grad():
        features, y = model.forward_features(x), model(x)
        mean, most, norm = features.mean((1, 2)), features.amax((1, 2)), model.head.norm
        pooled = {"avg": norm(mean), "max": norm(most), "": norm(features), "avgmax": norm((mean + most) / 2)}
        pooled["catavgmax"] = torch.cat((norm(mean), norm(most)), -1)
        torch.testing.assert_close(y, model.head.fc(pooled[pool]), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(model.forward_head(features, pre_logits=True), pooled[pool], rtol=1e-4, atol=1e-5)
        assert pooled[pool].shape[-1] == model.head_hidden_size
        model.reset_classifier(0)
        torch.testing.assert_close(model(x), pooled[pool], rtol=1e-4, atol=1e-5)


def test_catavgmax_has_twice_the_width():
    """num_features stays that of the map, as in timm's channels-last models; the head is twice as wide."""
    x = image()
    model = small(num_classes=0, global_pool="catavgmax")
    assert (model.num_features, model.head_hidden_size, model.head.num_features) == (48, 96, 96)
    assert model(x).shape == (2, 96)
    model.reset_classifier(4)
    assert model.head.fc.in_features == 96
    for pool, width in (("avg", 48), ("catavgmax", 96), ("", 48), ("max", 48), ("catavgmax", 96)):
        model.reset_classifier(3, pool)
        assert (model.num_features, model.head_hidden_size, model.head.fc.in_features) == (48, width, width)
        assert model(x).shape == ((2, 2, 2, 3) if pool == "" else (2, 3))
        model.reset_classifier(0)
        assert model(x).shape[-1] == width
    model.prune_intermediate_layers([1])
    model.reset_classifier(5, "catavgmax")
    assert (model.num_features, model.head_hidden_size) == (24, 48)
    assert model(x).shape == (2, 5)
    with torch.no_grad():
        scripted = torch.jit.script(small(num_classes=3, global_pool="catavgmax"))
        torch.testing.assert_close(scripted(x), small(num_classes=3, global_pool="catavgmax")(x))


def test_changing_the_pooling_keeps_the_norm_and_its_weights():
    model, x = small(num_classes=5), image()
    with torch.no_grad():
        model.head.norm.weight.copy_(torch.linspace(0.5, 2, 48))
        mean = model.forward_head(model.forward_features(x), pre_logits=True)
        model.reset_classifier(0, "catavgmax")
        both = model(x)
        torch.testing.assert_close(both[:, :48], mean)
        other = small(num_classes=0, global_pool="catavgmax")
        other.load_state_dict(model.state_dict())
        assert torch.equal(other(x), both)


@pytest.mark.parametrize("pool", ["mean", "token", "AVG"])
def test_an_unknown_pooling_is_named(pool):
    with pytest.raises(ValueError, match=rf"global_pool is '{pool}', expected one of '', 'avg'.*'catavgmax'"):
        small(global_pool=pool)
    model = small(num_classes=3)
    with pytest.raises(ValueError, match=f"global_pool is '{pool}'"):
        model.reset_classifier(7, pool)
    assert model.num_classes == 3
    assert model(image()).shape == (2, 3)  # nothing is half-changed


@pytest.mark.parametrize("img_size", [None, 224, (96, 1024), [33, 1]])
def test_any_input_size_can_be_set(img_size):
    """It changes nothing: any size works before and after."""
    model = small()
    before = model(image(33, 47))
    assert model.set_input_size(img_size=img_size) is None
    assert torch.equal(model(image(33, 47)), before)


@pytest.mark.parametrize("img_size", [0, -224, (224, 0), (224,), (3, 224, 224), (224, 2.5), "224", True, ()])
def test_an_impossible_input_size_is_named(img_size):
    with pytest.raises(ValueError, match=r"img_size is .* expected a positive int or"):
        small().set_input_size(img_size)


def test_there_is_no_patch_size_to_set():
    with pytest.raises(ValueError, match="patch_size is 16, but SSMamba has no patches"):
        small().set_input_size(224, patch_size=16)


def test_forward_head_and_pre_logits_agree(model):
    x = image()
    with torch.no_grad():
        features = model.forward_features(x)
        torch.testing.assert_close(model.forward_head(features), model(x))
        torch.testing.assert_close(model.head.fc(model.forward_head(features, pre_logits=True)), model(x))


# ---- intermediate features ----


@EVERY
def test_features_only_gives_four_maps(name):
    model = timm.create_model(name, features_only=True, device="meta")
    dims = [info["num_chs"] for info in model.feature_info.get_dicts()]
    assert model.feature_info.channels() == dims
    assert model.feature_info.reduction() == [4, 8, 16, 32]
    maps = model(torch.zeros(1, 3, 64, 96, device="meta"))
    # In the model's own layout, as timm's other channels-last models; forward_intermediates gives NCHW.
    assert model.output_fmt == "NHWC"
    assert [tuple(m.shape) for m in maps] == [(1, 64 // r, 96 // r, c) for c, r in zip(dims, (4, 8, 16, 32))]


@pytest.mark.parametrize("indices", [(0,), (1, 3), (0, 2), (-1,), (3,), (-2, -1)])
def test_features_only_of_some_stages(indices):
    model = small(features_only=True, out_indices=indices)
    assert model.feature_info.channels() == [DIMS[i] for i in indices]
    assert [m.shape[3] for m in model(image(batch=1))] == [DIMS[i] for i in indices]


def test_features_only_equals_forward_intermediates():
    features, model = small(features_only=True), small()
    x = image(65, 47)
    with torch.no_grad():
        maps = features(x)
        last, want = model.forward_intermediates(x)
        torch.testing.assert_close(last, model.forward_features(x))
    assert len(maps) == len(want) == 4
    for have, expected in zip(maps, want):
        torch.testing.assert_close(have.permute(0, 3, 1, 2), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(want[-1], last.permute(0, 3, 1, 2))


@pytest.mark.parametrize("cls", ["fx", "getter"])
def test_features_only_by_other_ways(cls):
    model = small(features_only=True, feature_cls=cls)
    x = image()
    maps = model(x)
    want = small().forward_intermediates(x, intermediates_only=True)
    assert len(maps) == 4
    for have, expected in zip(maps, want):
        if cls == "fx":  # keeps the model's own layout
            have = have.permute(0, 3, 1, 2)
        torch.testing.assert_close(have, expected, rtol=1e-5, atol=1e-5)
    sum(m.mean() for m in maps).backward()
    assert all(p.grad is not None for key, p in model.named_parameters() if "stages.0" in key)


def test_forward_intermediates_with_options():
    model = small()
    x = image()
    with torch.no_grad():
        _, maps = model.forward_intermediates(x)
        for indices, want in ((2, [2, 3]), ([0, 2], [0, 2]), ([-1], [3]), (None, [0, 1, 2, 3])):
            some = model.forward_intermediates(x, indices=indices, intermediates_only=True)
            assert len(some) == len(want)
            assert all(torch.equal(m, maps[i]) for m, i in zip(some, want))
        nhwc = model.forward_intermediates(x, output_fmt="NHWC", intermediates_only=True)
        assert all(torch.equal(m.permute(0, 3, 1, 2), n) for m, n in zip(nhwc, maps))
        early, some = model.forward_intermediates(x, indices=[0, 1], stop_early=True)
        assert torch.equal(early.permute(0, 3, 1, 2), maps[1])
        assert len(some) == 2
        normed = model.forward_intermediates(x, norm=True, intermediates_only=True)
        assert [m.shape for m in normed] == [m.shape for m in maps]


def test_stopping_early_does_not_run_the_later_stages():
    model = small()
    model.stages[2].register_forward_pre_hook(lambda *_: pytest.fail("stage 2 ran"))
    model.forward_intermediates(image(), indices=[1], stop_early=True)


def test_forward_intermediates_with_checkpointing_has_the_same_gradients():
    grads = []
    for enable in (False, True):
        model = small().train()
        model.set_grad_checkpointing(enable)
        sum(m.square().mean() for m in model.forward_intermediates(image(), intermediates_only=True)).backward()
        grads.append([p.grad for key, p in model.named_parameters() if "head" not in key])
    assert all(torch.equal(a, b) for a, b in zip(*grads))


@pytest.mark.parametrize("kwargs", [{"indices": [4]}, {"indices": [-5]}, {"indices": 5}, {"output_fmt": "NLC"}])
def test_forward_intermediates_refuses(kwargs):
    with pytest.raises((ValueError, AssertionError)):
        small().forward_intermediates(image(), **kwargs)


@pytest.mark.parametrize("indices", [[0], [1], [0, 2], 1, [3]])
def test_pruning_to_intermediate_layers(indices):
    """What remains computes the same maps, and is a whole model with its own width."""
    whole, pruned = small(num_classes=5), small(num_classes=5)
    taken = pruned.prune_intermediate_layers(indices)
    last = taken[-1]
    assert len(pruned.stages) == last + 1
    x = image()
    with torch.no_grad():
        want = whole.forward_intermediates(x, indices=taken, intermediates_only=True)
        _, found = pruned.forward_intermediates(x, indices=taken)
        assert all(torch.equal(a, b) for a, b in zip(found, want))
        assert pruned(x).shape == (2, 64 // (4 * 2**last), 64 // (4 * 2**last), DIMS[last])
        pruned.reset_classifier(3, "avg")
        assert pruned(x).shape == (2, 3)
        pruned.reset_classifier(0)
        assert pruned(x).shape == (2, DIMS[last])


def test_pruning_may_keep_the_head():
    model = small(num_classes=5)
    model.prune_intermediate_layers([3], prune_head=False)
    assert model(image()).shape == (2, 5)


# ---- training: groups, decay, checkpointing ----


@LIGHT
@pytest.mark.parametrize("coarse", [False, True])
def test_layer_groups_cover_every_parameter_once(name, coarse):
    model = timm.create_model(name, num_classes=3, device="meta")
    groups = group_parameters(model, model.group_matcher(coarse=coarse))
    names = [n for members in groups.values() for n in members]
    assert sorted(names) == sorted(n for n, _ in model.named_parameters())
    order = {n: k for k, members in groups.items() for n in members}
    assert order["stem.conv1.weight"] == 0
    assert order["head.fc.weight"] == max(order.values())
    depth = [order[f"stages.{i}.blocks.0.mlp.fc1.weight"] for i in range(4)]
    assert depth == sorted(depth)
    assert len(set(depth)) == 4
    if not coarse:
        assert order["stages.2.blocks.0.mlp.fc1.weight"] < order["stages.2.blocks.1.mlp.fc1.weight"]
    assert order["stages.1.downsample.conv.weight"] <= order["stages.1.blocks.0.mlp.fc1.weight"]
    assert order["stages.1.downsample.conv.weight"] > order["stages.0.blocks.0.mlp.fc1.weight"]


def test_layer_decay_gives_every_parameter_its_rate():
    model = small(num_classes=3)
    optimizer = create_optimizer_v2(model, "adamw", lr=1e-3, weight_decay=0.05, layer_decay=0.65)
    names = {id(p): n for n, p in model.named_parameters()}
    scale, decay = {}, {}
    for group in optimizer.param_groups:
        for p in group["params"]:
            assert id(p) not in scale
            scale[names[id(p)]], decay[names[id(p)]] = group["lr_scale"], group["weight_decay"]
    assert scale.keys() == set(names.values())
    assert scale["head.fc.weight"] == 1.0
    assert scale["stem.conv1.weight"] == min(scale.values()) < scale["stages.3.blocks.0.mlp.fc1.weight"]
    for n in decay:
        bare = n.rsplit(".", 1)[-1] in ("bias", "dt_bias", "A_log", "B_bias", "D") or "norm" in n
        assert (decay[n] == 0) == bare, n


def test_no_weight_decay_names_the_recurrence():
    model = small()
    names = model.no_weight_decay()
    assert {n.rsplit(".", 1)[-1] for n in names} == {"dt_bias", "A_log", "B_bias", "D"}
    assert names <= {n for n, _ in model.named_parameters()}


def test_checkpointing_changes_nothing():
    found = []
    for enable in (False, True):
        torch.manual_seed(1)
        model = small(num_classes=3, drop_path_rate=0.3).train()
        model.set_grad_checkpointing(enable)
        torch.manual_seed(2)  # the same paths are dropped in the recomputation
        loss = model(image()).square().mean()
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in model.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*found))


def test_checkpointing_recomputes_blocks():
    model = small().train()
    model.set_grad_checkpointing()
    calls = []
    model.stages[0].blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))
    model(image()).sum().backward()
    assert len(calls) == 2
    model.set_grad_checkpointing(False)
    model(image()).sum().backward()
    assert len(calls) == 3


def test_a_small_training_run_learns():
    """Bright and dark images are told apart in a few steps: forward, backward and optimiser work together."""
    model = small(num_classes=2).train()
    optimizer = create_optimizer_v2(model, "adamw", lr=2e-3)
    labels = torch.tensor([0, 1] * 4)
    x = image(32, 32, batch=8) * 0.5 + (labels * 2.0 - 1).view(-1, 1, 1, 1)
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(x), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0], losses


def test_drop_rates():
    model = small(num_classes=3, drop_rate=0.5, drop_path_rate=0.4, proj_drop_rate=0.3)
    rates = [block.drop_path1.drop_prob if hasattr(block.drop_path1, "drop_prob") else 0.0
             for stage in model.stages for block in stage.blocks]  # fmt: skip
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])
    x = image()
    with torch.no_grad():
        torch.testing.assert_close(model(x), small(num_classes=3)(x))  # evaluation drops nothing
        model.train()
        assert not torch.allclose(model(x), model(x))


def test_exponential_moving_average():
    model = small(num_classes=3)
    ema = ModelEmaV3(model, decay=0.5)
    before = model.stem.conv1.weight.detach().clone()
    with torch.no_grad():
        model.stem.conv1.weight.add_(1.0)
    ema.update(model, step=100)
    torch.testing.assert_close(ema.module.stem.conv1.weight, before + 0.5)
    with torch.no_grad():
        assert ema.module(image()).shape == (2, 3)


def test_copies_and_pickles(model):
    x = image()
    with torch.no_grad():
        want = model(x)
        for copy in (deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(copy(x), want)
            assert copy.stem.conv1.weight is not model.stem.conv1.weight


# ---- weights ----


def test_state_dict_round_trip(model):
    other = small(seed=1, num_classes=42)
    with torch.no_grad():
        assert not torch.allclose(other(image()), model(image()))
        other.load_state_dict(model.state_dict(), strict=True)
        assert torch.equal(other(image()), model(image()))


@pytest.mark.parametrize("kind", ["pth", "safetensors", "wrapped"])
def test_checkpoint_files(kind, model, tmp_path):
    """timm's checkpoint_path: plain, safetensors, or wrapped by a trainer in a dictionary with prefixes."""
    state = model.state_dict()
    path = tmp_path / f"weights.{'safetensors' if kind == 'safetensors' else 'pth'}"
    if kind == "safetensors":
        from safetensors.torch import save_file

        save_file(state, path)
    else:
        torch.save({"state_dict": {f"module.{k}": x for k, x in state.items()}} if kind == "wrapped" else state, path)
    loaded = timm.create_model("test_ssmamba", num_classes=42, checkpoint_path=str(path)).eval()
    with torch.no_grad():
        assert torch.equal(loaded(image()), model(image()))
    fresh = small(seed=1, num_classes=42)
    load_checkpoint(fresh, str(path))
    assert torch.equal(fresh.stem.conv1.weight, model.stem.conv1.weight)


def test_pretrained_weights_from_a_file(model, tmp_path):
    """pretrained=True with a local file, as a hub download would be; another classifier is initialised anew."""
    path = tmp_path / "weights.pth"
    torch.save(model.state_dict(), path)
    cfg = {"file": str(path), "num_classes": 42}
    loaded = timm.create_model("test_ssmamba", pretrained=True, pretrained_cfg_overlay=cfg, num_classes=42).eval()
    with torch.no_grad():
        assert torch.equal(loaded(image()), model(image()))
    other = timm.create_model("test_ssmamba", pretrained=True, pretrained_cfg_overlay=cfg, num_classes=5)
    assert torch.equal(other.stem.conv2.weight, model.stem.conv2.weight)
    assert other.head.fc.weight.shape == (5, 48)
    features = timm.create_model("test_ssmamba", pretrained=True, pretrained_cfg_overlay=cfg, features_only=True)
    with torch.no_grad():
        torch.testing.assert_close(features.eval()(image())[-1], model.forward_features(image()))


@pytest.mark.parametrize("chans", [1, 4, 6])
def test_other_input_channels_from_three_channel_weights(chans, model, tmp_path):
    path = tmp_path / "weights.pth"
    torch.save(model.state_dict(), path)
    other = timm.create_model(
        "test_ssmamba", pretrained=True, pretrained_cfg_overlay={"file": str(path), "num_classes": 42},
        num_classes=42, in_chans=chans,
    ).eval()  # fmt: skip
    weight = model.stem.conv1.weight
    assert other.stem.conv1.weight.shape[1] == chans
    if chans == 1:
        torch.testing.assert_close(other.stem.conv1.weight, weight.sum(1, keepdim=True))
        x = image(chans=1)
        with torch.no_grad():
            torch.testing.assert_close(other(x), model(x.expand(-1, 3, -1, -1)), rtol=1e-4, atol=1e-4)
    if chans == 6:
        torch.testing.assert_close(other.stem.conv1.weight, weight.repeat(1, 2, 1, 1) / 2)
    with torch.no_grad():
        assert other(image(chans=chans)).shape == (2, 42)


def test_weights_for_the_hub(model, tmp_path):
    """timm's own folder format, and back by local-dir."""
    pytest.importorskip("huggingface_hub")
    save_for_hf(model, tmp_path, safe_serialization=True)
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    with torch.no_grad():
        assert torch.equal(loaded(image()), model(image()))
    again = ssmamba_models.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert torch.equal(again.stem.conv1.weight, model.stem.conv1.weight)
