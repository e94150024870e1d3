"""MAMIM's terms with a teacher: they are what their equations say, teach the student alone, and resist collapse."""

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from mamim_cases import hide, make, make_batch

from ssmamba_models.ssl.feature_targets import feature_targets, resample
from ssmamba_models.ssl.info_nce import info_nce

pytestmark = pytest.mark.usefixtures("one_thread")

ALONE = {"pixel_weight": 0.0, "color_weight": 0.0, "cross_weight": 0.0}
TERMS = {
    "feature": {"feature_weight": 1.0},
    "cross_feature": {"cross_feature_weight": 1.0},
    "cross": {"alignment": "teacher", "cross_weight": 1.0},
    "local": {"local_weight": 1.0},
}


def only(term, **arguments):
    return make(**{**ALONE, **TERMS[term], **arguments}).eval()


def local_batch(count=4):
    return make_batch(count, local_crops=2, local_size=64)


def unlike(mamim, seed=1):
    """Give the teacher weights of its own, so that a swap of teacher and student shows."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in mamim.teacher.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return mamim


def maps_of(encoder, images):
    """Stages 3 and 4 in float64 lists: (B, h, w, C)."""
    with torch.no_grad():
        maps = encoder.forward_intermediates(images, output_fmt="NHWC", intermediates_only=True)
    return [part.double().numpy() for part in maps[2:]]


def student_maps(mamim, batch):
    images, mask = (torch.cat([batch[f"low{end}"], batch[f"high{end}"]]) for end in ("", "_mask"))
    with torch.no_grad():
        return mamim._encode(images, mask)


def standardised(values):
    flat = values.reshape(-1, values.shape[-1])
    return (values - flat.mean(0)) / (flat.std(0) + 1e-5)


def targets_of(mamim, batch):
    """The two halves of every position's target, by loops: (2 B, h, w, C) and (2 B, h, w, C')."""
    fine, coarse = maps_of(mamim.teacher["encoder"], torch.cat([batch["low"], batch["high"]]))
    fine, small = standardised(fine), standardised(coarse)
    large = np.zeros((*fine.shape[:3], small.shape[-1]))
    for y in range(fine.shape[1]):
        for x in range(fine.shape[2]):
            large[:, y, x] = small[:, y // 2, x // 2]
    return fine, large


def error_at(predicted, target, split):
    """Mean squared error of one position, either half counting alike."""
    square = (predicted - target) ** 2
    return (square[:split].mean() + square[split:].mean()) / 2


def bilinear(values, theta, size):
    """`resample` by loops: values (h, w, C), theta (2, 3) -> (size, size, C)."""
    h, w, _ = values.shape
    out = np.zeros((size, size, values.shape[-1]))
    for i in range(size):
        for j in range(size):
            point = np.array([(2 * j + 1) / size - 1, (2 * i + 1) / size - 1, 1.0])
            x, y = theta @ point
            x = np.clip(((x + 1) * w - 1) / 2, 0, w - 1)
            y = np.clip(((y + 1) * h - 1) / 2, 0, h - 1)
            left, top = min(int(x), w - 2), min(int(y), h - 2)
            a, b = x - left, y - top
            out[i, j] = (1 - b) * ((1 - a) * values[top, left] + a * values[top, left + 1]) + b * (
                (1 - a) * values[top + 1, left] + a * values[top + 1, left + 1]
            )
    return out


def nce(queries, keys, temperature=0.2):
    queries = queries / np.linalg.norm(queries, axis=1, keepdims=True)
    keys = keys / np.linalg.norm(keys, axis=1, keepdims=True)
    logits = queries @ keys.T / temperature
    return np.mean([math.log(np.exp(row - row[i]).sum()) for i, row in enumerate(logits)])


def vectors_of(projector, maps):
    with torch.no_grad():
        pooled = torch.as_tensor(maps).float().mean((1, 2))
        return projector(F.layer_norm(pooled, pooled.shape[-1:])).double().numpy()


def test_resample_is_linear_interpolation():
    batch, values = make_batch(), torch.randn(4, 5, 4, 3)
    found = resample(values, batch["theta"], (6, 6)).numpy()
    for i in range(4):
        expected = bilinear(values[i].double().numpy(), batch["theta"][i].double().numpy(), 6)
        np.testing.assert_allclose(found[i], expected, atol=1e-5)


def test_features_of_the_same_view_are_predicted_at_masked_patches():
    mamim, batch = unlike(only("feature")), make_batch()
    fine, large = targets_of(mamim, batch)
    target, split = np.concatenate([fine, large], -1), fine.shape[-1]
    with torch.no_grad():
        predicted = mamim.decoder(*student_maps(mamim, batch))["own"].double().numpy()
    mask = torch.cat([batch["low_mask"], batch["high_mask"]]).numpy()
    expected = np.mean([error_at(predicted[at], target[at], split) for at in zip(*np.nonzero(mask))])
    out = mamim(batch)
    assert out["feature"].item() == pytest.approx(expected, rel=1e-4)
    assert out["loss"].item() == out["feature"].item()


def test_features_of_the_other_view_are_predicted_at_masked_patches():
    mamim, batch = unlike(only("cross_feature")), make_batch()
    fine, large = targets_of(mamim, batch)
    target, split = np.concatenate([fine, large], -1), fine.shape[-1]
    count, size = len(batch["low"]), fine.shape[1]
    with torch.no_grad():
        predicted = {k: v.double().numpy() for k, v in mamim.decoder(*student_maps(mamim, batch)).items()}
    losses = []
    for i in range(count):
        theta = batch["theta"][i].double().numpy()
        finer = bilinear(predicted["finer"][i], theta, size)
        low_target = bilinear(target[i], theta, size)
        sums, weights = np.zeros(2), np.zeros(2)
        masked = bilinear(batch["low_mask"][i].double().numpy()[..., None], theta, size)[..., 0]
        for at in np.ndindex(size, size):
            sums[0] += masked[at] * error_at(finer[at], target[count + i][at], split)
            weights[0] += masked[at]
            if batch["high_mask"][i].numpy()[at]:
                sums[1] += error_at(predicted["coarser"][count + i][at], low_target[at], split)
                weights[1] += 1
        losses.append((sums / weights.clip(1e-6)).mean())
    assert mamim(batch)["cross_feature"].item() == pytest.approx(np.mean(losses), rel=1e-4)


def test_the_alignment_with_a_teacher_finds_the_other_view():
    mamim, batch = unlike(only("cross", temperature=0.3)), make_batch()
    low, high = (part.double().numpy() for part in student_maps(mamim, batch)[1].chunk(2))
    taught_low, taught_high = np.split(
        maps_of(mamim.teacher["encoder"], torch.cat([batch["low"], batch["high"]]))[1], 2
    )
    thetas, size = batch["theta"].double().numpy(), high.shape[1]

    def window(maps):
        return np.stack([bilinear(values, theta, size) for values, theta in zip(maps, thetas)])

    queries = [vectors_of(mamim.predictor, maps) for maps in (window(low), high)]
    keys = [vectors_of(mamim.teacher["predictor"], maps) for maps in (taught_high, window(taught_low))]
    expected = np.mean([nce(q, k, 0.3) for q, k in zip(queries, keys)])
    assert mamim(batch)["cross"].item() == pytest.approx(expected, rel=1e-3)


def test_local_views_find_the_teachers_low_view():
    mamim, batch = unlike(only("local")), local_batch()
    keys = vectors_of(mamim.teacher["predictor"], maps_of(mamim.teacher["encoder"], batch["low"])[1])
    losses = []
    for crop in range(2):
        with torch.no_grad():
            maps = mamim.encoder.forward_features(batch["local"][:, crop])
        losses.append(nce(vectors_of(mamim.predictor, maps), keys))
    assert mamim(batch)["local"].item() == pytest.approx(np.mean(losses), rel=1e-3)


def test_all_terms_add_up():
    weights = {"pixel": 0.9, "color": 0.7, "feature": 0.6, "cross_feature": 0.5, "cross": 0.4, "local": 0.3}
    out = make(alignment="teacher", **{f"{k}_weight": v for k, v in weights.items()})(local_batch())
    parts = {**weights, "low": 0.9, "high": 0.9}
    del parts["pixel"]
    torch.testing.assert_close(out["loss"], sum(weight * out[name] for name, weight in parts.items()))
    assert all(out[name] > 0 for name in parts)


@pytest.mark.parametrize("term", TERMS)
def test_the_student_learns_and_the_teacher_does_not(term):
    mamim = make(**{**ALONE, **TERMS[term]})
    mamim(local_batch())["loss"].backward()
    silent = {n for n, p in mamim.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())}
    # Local views have no masks.
    assert silent == ({"mask_token"} if term == "local" else set())
    teacher = [p for n, p in mamim.named_parameters() if n.startswith("teacher.")]
    assert teacher
    assert not any(p.requires_grad or p.grad is not None for p in teacher)


@pytest.mark.parametrize("term", ["feature", "cross_feature"])
def test_only_the_teacher_sees_masked_pixels(term):
    """What is masked changes the loss through the targets alone: with the teacher's eyes shut, not at all."""
    mamim, batch = only(term), make_batch()
    other = {**batch, "low": torch.where(hide(batch, "low"), torch.randn_like(batch["low"]), batch["low"])}
    assert mamim(batch)[term].item() != mamim(other)[term].item()
    fixed = mamim._teach(torch.cat([batch["low"], batch["high"]]))
    mamim._teach = lambda images: fixed
    assert mamim(batch)[term].item() == mamim(other)[term].item()


def test_the_teacher_moves_at_the_start_of_each_step_but_the_first():
    mamim = make(feature_weight=1.0, teacher_momentum=0.5)
    before = copy.deepcopy(mamim.teacher.state_dict())
    with torch.no_grad():
        mamim.encoder.stem.conv1.weight.add_(1.0)
    mamim.start_step(0, 0)
    assert all(torch.equal(value, before[name]) for name, value in mamim.teacher.state_dict().items())
    mamim.start_step(0, 1)
    name = "copies.encoder.stem.conv1.weight"
    torch.testing.assert_close(mamim.teacher.state_dict()[name], before[name] + 0.5)


def test_without_its_terms_there_is_no_teacher():
    mamim = make()
    mamim.start_step(0, 3)
    assert not any("teacher" in name for name in mamim.state_dict())


def test_targets_count_every_channel_alike():
    torch.manual_seed(0)
    scales = torch.logspace(-3, 3, 6)
    targets = feature_targets(torch.randn(8, 4, 4, 6) * scales + 5, torch.randn(8, 2, 2, 3) - 2)
    assert targets.shape == (8, 4, 4, 9)
    torch.testing.assert_close(targets.mean((0, 1, 2)), torch.zeros(9), atol=1e-3, rtol=0)
    torch.testing.assert_close(targets.square().mean((0, 1, 2)), torch.ones(9), atol=5e-2, rtol=0)


@pytest.mark.parametrize("term", ["feature", "cross_feature", "cross"])
def test_it_learns_and_features_stay_apart(term):
    """Without pixels to hold on to, and with the teacher following."""
    mamim, batch = make(**{**ALONE, **TERMS[term], "teacher_momentum": 0.9}), make_batch(8)
    optimizer = torch.optim.AdamW([p for p in mamim.parameters() if p.requires_grad], 3e-3)
    losses = []
    for step in range(40):
        mamim.start_step(0, step)
        out = mamim(batch)
        out["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(out["loss"].item())
    assert losses[-1] < 0.9 * losses[0]
    assert out["feature_cosine"] < 0.99


def test_a_reconstruction_without_pixels_is_flat():
    mamim, batch = make(pixel_weight=0.0).eval(), make_batch()
    predicted = mamim.reconstruct(batch)["predicted"]
    blocks = F.unfold(predicted[:, :1], 16, stride=16).transpose(1, 2)[batch["low_mask"].flatten(1)]
    assert (blocks.max(1).values - blocks.min(1).values).max() < 1e-5


def test_one_tile_has_no_others_to_differ_from():
    with pytest.raises(ValueError, match="nothing to choose from"):
        info_nce(torch.randn(1, 4), torch.randn(1, 4), 0.2)


@pytest.mark.parametrize("name", ["pixel", "feature", "cross_feature", "local"])
@pytest.mark.parametrize("value", [-1.0, math.nan])
def test_bad_weights_are_named(name, value):
    with pytest.raises(ValueError, match=f"{name}_weight is"):
        make(**{f"{name}_weight": value})


def test_a_training_without_any_term_is_refused():
    with pytest.raises(ValueError, match="nothing to learn"):
        make(**ALONE)
    with pytest.raises(ValueError, match="teacher_momentum is 2"):
        make(feature_weight=1.0, teacher_momentum=2.0)


def test_batches_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"local_weight needs local views .* found none; set view_args.local_crops"):
        make(local_weight=1.0)(make_batch())
    with pytest.raises(ValueError, match=r"multiples of 32 px.*cross_feature_weight=0"):
        make(cross_weight=0.0, cross_feature_weight=1.0)(make_batch(img_size=80))
