"""Bags of shared augmentation: what they hold, and that they are the same however a job is run or broken."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("h5py", reason="feature files need the [wsi] extra")
pytest.importorskip("openslide", reason="slides need the [wsi] extra")

from job_cases import FEATURES, TILE, TINY, digests, disc, extract, leftovers, make_slides
from slide_files import corrupt_tile, make_pyramid

from ssmamba_models.data.convert import convert_features
from ssmamba_models.data.feature_check import check_slide_features
from ssmamba_models.data.features import open_slide_features, read_slide_features
from ssmamba_models.engine.checkpoints import plain_state, save_weights
from ssmamba_models.engine.encoder import load_encoder
from ssmamba_models.wsi import local_engine
from ssmamba_models.wsi.dry_run import dry_run
from ssmamba_models.wsi.extract_plan import ExtractPlan
from ssmamba_models.wsi.reader import open_slide
from ssmamba_models.wsi.shared_aug import SharedAug, SharedAugmentation, draw_augmentation
from ssmamba_models.wsi.tile_encoder import TileEncoder

pytestmark = [
    pytest.mark.filterwarnings("ignore::ssmamba_models.engine.encoder.RandomWeightsWarning"),
    pytest.mark.usefixtures("one_thread"),
]

BAGS = {"shared_aug": 3, "shared_aug_tiles": 12}


@pytest.fixture(scope="module")
def slides(tmp_path_factory):
    return make_slides(tmp_path_factory.mktemp("shared_aug") / "slides", "ab")


@pytest.fixture(scope="module")
def whole(slides, tmp_path_factory):
    """A job that ran through; not to be written in."""
    out = tmp_path_factory.mktemp("whole") / "job"
    extract(slides, out, **BAGS)
    return out


def test_bags_stand_beside_the_same_features(slides, whole, tmp_path):
    extract(slides / "a.tif", tmp_path / "job")
    plain = read_slide_features(tmp_path / "job" / FEATURES / "a.h5", bags=True)
    read = read_slide_features(whole / FEATURES / "a.h5", bags=True)
    assert plain.bags is None
    np.testing.assert_array_equal(read.features, plain.features)
    np.testing.assert_array_equal(read.coords, plain.coords)
    width = read.features.shape[1]
    assert [(features.shape, coords.shape) for features, coords in read.bags] == [((12, width), (12, 2))] * 3
    places = {tuple(place) for place in read.coords.tolist()}
    drawn = [tuple(map(tuple, coords.tolist())) for _, coords in read.bags]
    assert all(places.issuperset(bag) for bag in drawn)
    assert len(set(drawn)) == 3


def test_a_bag_is_its_tiles_under_one_augmentation(slides, whole):
    read = read_slide_features(whole / FEATURES / "a.h5", bags=True)
    encoder = TileEncoder(load_encoder("test_ssmamba", img_size=TILE))
    with open_slide(slides / "a.tif") as slide:
        for bag, (features, coords) in enumerate(read.bags):
            chosen, augmentation = SharedAug(3, 12, 0).draw("a", bag, len(read.coords))
            np.testing.assert_array_equal(coords, read.coords[chosen])
            tiles = np.stack([slide.read_region(x, y, TILE, TILE, 1.0) for x, y in coords])
            images = augmentation(torch.from_numpy(tiles).permute(0, 3, 1, 2) / 255)
            mean, std = (
                torch.tensor(encoder.encoder.data_config[key]).view(3, 1, 1) for key in ("mean", "std")
            )
            expected = encoder.encoder.embed((images - mean) / std)
            np.testing.assert_allclose(features, expected.numpy(), atol=1e-4)


def test_bags_are_read_one_by_one(whole):
    with open_slide_features(whole / FEATURES / "a.h5") as file:
        assert len(file.bags) == 3
        features, coords = file.bags[-1]
        np.testing.assert_array_equal(features, file.bags.features[2])
        assert coords.dtype == np.int64
        with pytest.raises(IndexError, match="no bag 3; the file has 3"):
            file.bags[3]
    with open_slide_features(whole / FEATURES / "b.h5") as file:
        assert not np.array_equal(file.bags[2][0], features)


class TestSameBytes:
    def test_whatever_the_processes_and_neighbours(self, slides, whole, tmp_path):
        extract(slides / "b.tif", tmp_path / "job", workers=2, **BAGS)
        path = f"{FEATURES}/b.h5"
        assert digests(tmp_path / "job")[path] == digests(whole)[path]

    def test_after_an_interruption(self, slides, whole, tmp_path, monkeypatch):
        out, real, calls = tmp_path / "job", local_engine.TileEncoder.start_augmented, []

        def interrupted(self, pixels, augmentation):
            calls.append(len(pixels))
            if len(calls) == 3:
                raise KeyboardInterrupt
            return real(self, pixels, augmentation)

        monkeypatch.setattr(local_engine.TileEncoder, "start_augmented", interrupted)
        with pytest.raises(KeyboardInterrupt):
            extract(slides, out, **BAGS)
        assert leftovers(out) == []
        monkeypatch.undo()
        extract(slides, out, **BAGS)
        assert digests(out) == digests(whole)

    @pytest.mark.slow
    def test_after_a_kill(self, slides, whole, tmp_path):
        program = f"""
import os, signal, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from job_cases import extract
from ssmamba_models.wsi import local_engine
real, calls = local_engine.TileEncoder.start_augmented, []
def killed(self, pixels, augmentation):
    calls.append(1)
    if len(calls) == 9:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(self, pixels, augmentation)
local_engine.TileEncoder.start_augmented = killed
extract({str(slides)!r}, {str(tmp_path / "job")!r}, **{BAGS!r})
"""
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        run = subprocess.run([sys.executable, "-W", "ignore", "-c", program], env=environment, check=False)
        assert run.returncode == -signal.SIGKILL
        assert extract(slides, tmp_path / "job", **BAGS).new == 1  # one slide was done
        assert digests(tmp_path / "job") == digests(whole)
        assert leftovers(tmp_path / "job") == []


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"shared_aug": 0}, "shared_aug was 3, now None"),
        ({"shared_aug": 4}, "shared_aug was 3, now 4"),
        ({"shared_aug_tiles": 13}, "shared_aug_tiles was 12, now 13"),
    ],
)
def test_a_job_does_not_mix_bags(slides, whole, changes, named):
    with pytest.raises(ValueError, match=named):
        extract(slides, whole, **{**BAGS, **changes})


def test_the_seed_decides(slides, tmp_path):
    weights = tmp_path / "weights.safetensors"
    save_weights(weights, plain_state(load_encoder("test_ssmamba", img_size=TILE).model), {"model": "test_ssmamba"})
    files = []
    for seed in (0, 1):
        extract(slides / "a.tif", tmp_path / f"job{seed}", seed=seed, checkpoint=str(weights), **BAGS)
        files.append(read_slide_features(tmp_path / f"job{seed}" / FEATURES / "a.h5", bags=True))
    np.testing.assert_array_equal(files[0].features, files[1].features)
    assert not np.array_equal(files[0].bags[0][1], files[1].bags[0][1])
    with pytest.raises(ValueError, match="shared_aug_seed was 0, now 1"):
        extract(slides / "a.tif", tmp_path / "job0", seed=1, checkpoint=str(weights), **BAGS)


def test_a_job_without_bags_has_the_hash_of_before_there_were_any(slides, tmp_path):
    plan = ExtractPlan(**TINY)
    encoder = plan.load()
    settings = plan.settings(encoder, encoder.provenance())
    assert not any(key.startswith("shared_aug") for key in settings.values())
    with_bags = ExtractPlan(**TINY, **BAGS).settings(encoder, encoder.provenance())
    assert with_bags.hash != settings.hash


class TestBadTiles:
    @pytest.fixture
    def bad(self, tmp_path):
        slide = make_pyramid(tmp_path / "bad.tif", (1600, 1200), mpp=0.5, levels=(1, 4), content=disc)
        return corrupt_tile(slide, 17)

    def test_a_tile_that_cannot_be_read_is_in_no_bag(self, bad, whole, tmp_path):
        extract(bad, tmp_path / "job", max_bad_tiles=0.5, shared_aug=4, shared_aug_tiles=30)
        path = tmp_path / "job" / FEATURES / "bad.h5"
        read = read_slide_features(path, bags=True)
        assert check_slide_features(path) == []  # tiles of bags are tiles of the slide
        grid = read_slide_features(whole / FEATURES / "a.h5").coords  # the same slide, undamaged
        readable, torn = set(map(tuple, read.coords.tolist())), 0
        for bag, (_, coords) in enumerate(read.bags):
            drawn = grid[SharedAug(4, 30, 0).draw("bad", bag, len(grid))[0]]
            good = np.array([tuple(place) in readable for place in drawn.tolist()])
            np.testing.assert_array_equal(coords[good], drawn[good])
            torn += np.count_nonzero(~good)
        assert torn > 0

    def test_a_bag_without_a_readable_tile_fails_the_slide(self, bad, tmp_path, monkeypatch):
        def none_readable(self, part, *rest):
            real(self, part, [(place, "torn") for place in range(len(part.coords))] if part.bag == 1 else [], *rest[1:])

        real = local_engine.SlideRun.take
        monkeypatch.setattr(local_engine.SlideRun, "take", none_readable)
        result = extract(bad, tmp_path / "job", **BAGS)
        assert result.failed == {"bad": "no tile of a bag of shared augmentation can be read"}
        assert list((tmp_path / "job").rglob("*.h5")) == []

    def test_too_many_fail_the_slide_as_without_bags(self, bad, tmp_path):
        result = extract(bad, tmp_path / "job", max_bad_tiles=0.0, **BAGS)
        assert "cannot be read" in result.failed["bad"]


def test_float16_and_token_maps(slides, whole, tmp_path):
    extract(slides / "a.tif", tmp_path / "job", dtype="float16", grid=True, **BAGS)
    single = read_slide_features(whole / FEATURES / "a.h5", bags=True)
    half = read_slide_features(tmp_path / "job" / FEATURES / "a.h5", bags=True, grid=True)
    assert half.bags[0][0].dtype == np.float16
    assert len(half.grid) == len(half.coords)
    np.testing.assert_allclose(half.bags[1][0], single.bags[1][0], rtol=2e-3, atol=2e-3)


class TestFiles:
    def test_check_finds_what_is_wrong_with_bags(self, whole, tmp_path):
        import h5py

        path = tmp_path / "a.h5"
        path.write_bytes((whole / FEATURES / "a.h5").read_bytes())
        assert check_slide_features(path) == []
        with h5py.File(path, "r+") as file:
            file["bags/features"][1, 3, 2] = np.nan
            file["bags/features"][2, 4] = 0
            file["bags/coords"][0, 0] = (1, 1)
        found = {problem.kind: problem.message for problem in check_slide_features(path)}
        assert set(found) == {"nan", "zero", "outside"}
        assert found["nan"] == "features in bags of 1 of 3 bags with NaN (first: row 1)"
        assert found["outside"] == "1 bags have tiles that the slide has not (first: bag 0)"

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            (lambda file: file.__delitem__("bags/coords"), "no data set 'bags/coords'"),
            (lambda file: file.move("bags/coords", "bags/features2"), "no data set 'bags/coords'"),
            (lambda file: file["bags/coords"].resize(2, axis=0), r"bags/coords have shape \(2, 12, 2\), expected \(3,"),
            (lambda file: file["bags/features"].resize(0, axis=0), "none of them 0"),
        ],
    )
    def test_bags_that_do_not_fit_are_refused(self, whole, tmp_path, change, words):
        import h5py

        path = tmp_path / "a.h5"
        path.write_bytes((whole / FEATURES / "a.h5").read_bytes())
        with h5py.File(path, "r+") as file:
            change(file)
        with pytest.raises(ValueError, match=words):
            read_slide_features(path)

    @pytest.mark.parametrize("layout", ["clam", "trident"])
    def test_bags_go_to_other_layouts_and_back(self, whole, tmp_path, layout):
        folder = whole / FEATURES
        there = convert_features(folder, tmp_path / "there", source_layout="ssmamba", target_layout=layout)
        back = convert_features(tmp_path / "there", tmp_path / "back", source_layout=layout, target_layout="ssmamba")
        assert (there.failed, back.failed) == ([], [])
        again = {path.name: path for path in (tmp_path / "back").rglob("*.h5")}
        for name in ("a.h5", "b.h5"):
            mine, theirs = (read_slide_features(path, bags=True) for path in (folder / name, again[name]))
            for one, other in zip(mine.bags, theirs.bags, strict=True):
                np.testing.assert_array_equal(one[0], other[0])
                np.testing.assert_array_equal(one[1], other[1])


def test_a_dry_run_counts_them(slides, tmp_path):
    run = dry_run(slides, tmp_path / "job", ExtractPlan(**TINY, **BAGS), progress=False)
    assert run.bag_tiles == 2 * 3 * 12
    assert run.seconds == pytest.approx((run.tiles + 72) / run.tiles_per_second)


@pytest.mark.parametrize("changes", [{"shared_aug": -1}, {"shared_aug_tiles": 0}])
def test_plans(changes):
    with pytest.raises(ValueError, match=f"{next(iter(changes))} is"):
        ExtractPlan(**{**TINY, **changes})


class TestAugmentation:
    def test_draws_are_as_often_as_they_should_be(self):
        drawn = [draw_augmentation(np.random.default_rng(seed)) for seed in range(2000)]
        assert np.mean([bool(one.jitter) for one in drawn]) == pytest.approx(0.8, abs=0.05)
        assert np.mean([one.gray for one in drawn]) == pytest.approx(0.2, abs=0.05)
        assert np.mean([one.sigma is not None for one in drawn]) == pytest.approx(0.5, abs=0.05)
        left, top, width, height = np.array([one.crop for one in drawn]).T
        assert (width * height >= 0.5 - 1e-9).all()
        assert (left >= 0).all()
        assert (top >= 0).all()
        assert (left + width <= 1 + 1e-9).all()
        assert (top + height <= 1 + 1e-9).all()
        assert np.ptp(width * height) > 0.45
        factors = [dict(one.jitter) for one in drawn if one.jitter]
        for name, low, high in (("brightness", 0.6, 1.4), ("contrast", 0.6, 1.4), ("hue", -0.2, 0.2)):
            values = np.array([factor[name] for factor in factors])
            assert low <= values.min() < low + 0.05 * (high - low)
            assert high >= values.max() > high - 0.05 * (high - low)
        assert len({tuple(factor) for factor in factors}) == 24  # every order

    def test_each_tile_is_altered_in_the_same_way(self):
        tile = torch.rand(1, 3, 32, 32)
        for seed in range(10):
            altered = draw_augmentation(np.random.default_rng(seed))(tile.expand(3, -1, -1, -1).clone())
            assert altered.shape == (3, 3, 32, 32)
            assert altered.min() >= 0
            assert altered.max() <= 1
            assert torch.equal(altered[0], altered[2])

    def test_each_part_does_what_it_says(self):
        tile = torch.rand(2, 3, 40, 40)
        whole = (0.0, 0.0, 1.0, 1.0)
        torch.testing.assert_close(SharedAugmentation(whole, (), False, None)(tile), tile)
        brighter = SharedAugmentation(whole, (("brightness", 1.2),), False, None)(tile)
        torch.testing.assert_close(brighter, (tile * 1.2).clamp(0, 1))
        gray = SharedAugmentation(whole, (), True, None)(tile)
        torch.testing.assert_close(gray[:, 0], gray[:, 2])
        gray[0, 0] += 1  # may be written to
        assert not torch.equal(gray[:, 0], gray[:, 2])
        assert SharedAugmentation(whole, (), False, 2.0)(tile).std() < 0.5 * tile.std()
        flat = torch.zeros(1, 3, 40, 40)
        flat[..., 20:] = 1
        assert SharedAugmentation((0.5, 0.0, 0.5, 0.5), (), False, None)(flat).min() == 1
