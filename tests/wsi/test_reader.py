"""Tiles hold the pixels that they say they hold, whatever reads them."""

import pickle
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from slide_files import corrupt_tile, make_pyramid, pixels, tissue, waves

from ssmamba_models.wsi.errors import TileError
from ssmamba_models.wsi.grid import make_grid
from ssmamba_models.wsi.reader import open_slide

openslide = pytest.importorskip("openslide", reason="slides need the [wsi] extra")

SIZE, MPP = (1500, 1100), 0.25


@pytest.fixture(scope="module")
def pyramid(tmp_path_factory):
    """Levels of 1 and 4, with a tile of level 0 missing; see `SIZE` and `MPP`."""
    path = tmp_path_factory.mktemp("slides") / "waves.tif"
    return make_pyramid(path, SIZE, MPP, content=waves, missing={(1, 2)})


@pytest.fixture(params=["openslide", "tifffile"])
def slide(request, pyramid):
    with open_slide(pyramid, backend=request.param) as opened:
        yield opened


def reference(path, x, y, width, height, level):
    """OpenSlide's own pixels, on white."""
    with openslide.OpenSlide(path) as opened:
        region = opened.read_region((x, y), level, (width, height))
    flat = Image.new("RGB", region.size, "white")
    flat.paste(region, mask=region.getchannel("A"))
    return flat


class TestOwnMpp:
    @pytest.mark.parametrize(("x", "y"), [(0, 0), (301, 407), (500, 200), (1400, 1000), (-30, -40), (5000, 0)])
    def test_level_0_is_openslides_to_the_last_bit(self, slide, pyramid, x, y):
        tile = slide.read_region(x, y, 224, 224, MPP)
        assert np.array_equal(tile, np.array(reference(pyramid, x, y, 224, 224, 0)))

    @pytest.mark.parametrize(("x", "y"), [(0, 0), (404, 100), (-40, 800)])
    def test_level_1_is_openslides_to_the_last_bit(self, slide, pyramid, x, y):
        tile = slide.read_region(x, y, 100, 80, MPP * 4)
        assert np.array_equal(tile, np.array(reference(pyramid, x, y, 100, 80, 1)))

    def test_level_1_between_its_pixels_is_openslides_too(self, pyramid):
        with open_slide(pyramid) as opened:
            tile = opened.read_region(401, 103, 100, 80, MPP * 4)
        assert np.array_equal(tile, np.array(reference(pyramid, 401, 103, 100, 80, 1)))

    def test_the_pixels_are_those_written(self, slide):
        known = pixels(waves, SIZE)
        assert np.array_equal(slide.read_region(10, 20, 300, 200, MPP), known[20:220, 10:310])

    def test_what_is_missing_or_beyond_the_edge_is_white(self, slide):
        assert (slide.read_region(520, 260, 200, 200, MPP) == 255).all()
        assert (slide.read_region(*SIZE, 10, 10, MPP) == 255).all()
        tile = slide.read_region(SIZE[0] - 10, 0, 20, 20, MPP)
        assert (tile[:, 10:] == 255).all()
        assert not (tile[:, :10] == 255).all()

    def test_real_slide(self, data_root):
        path = data_root / "slides" / "cmu-1-small-region.svs"
        with open_slide(path) as opened:
            assert (opened.backend, opened.name, opened.mpp) == ("openslide", "cmu-1-small-region", 0.499)
            assert opened.dimensions == (2220, 2967)
            for x, y in ((0, 0), (777, 1234), (2100, 2900)):
                tile = opened.read_region(x, y, 224, 224, 0.499)
                assert np.array_equal(tile, np.array(reference(path, x, y, 224, 224, 0)))


class TestOtherMpp:
    @pytest.mark.parametrize("mpp", [0.3, 0.5, 0.77])
    def test_level_0_resized_once(self, slide, pyramid, mpp):
        self.check(slide, pyramid, 103, 57, mpp, level=0, downsample=1)

    @pytest.mark.parametrize("mpp", [1.1, 2.0, 3.3])
    def test_level_1_resized_once(self, slide, pyramid, mpp):
        self.check(slide, pyramid, 104, 56, mpp, level=1, downsample=4)

    def check(self, slide, pyramid, x, y, mpp, level, downsample):
        field = 96 * mpp / MPP / downsample
        whole = int(np.ceil(field))
        region = reference(pyramid, x, y, whole, whole, level)
        expected = region.resize((96, 96), Image.Resampling.BICUBIC, box=(0, 0, field, field))
        assert np.array_equal(slide.read_region(x, y, 96, 96, mpp), np.array(expected))
        assert slide.field_of_view(x, y, 96, 96, mpp).level == level

    def test_a_finer_mpp_than_the_slides_is_read_and_told(self, slide):
        tile = slide.read_region(100, 100, 64, 64, 0.125)
        assert slide.upsamples(0.125)
        assert slide.field_of_view(100, 100, 64, 64, 0.125).upsampled
        assert not slide.upsamples(MPP)
        assert not slide.field_of_view(100, 100, 64, 64, MPP).upsampled
        expected = Image.fromarray(pixels(waves, SIZE)[100:132, 100:132]).resize((64, 64), Image.Resampling.BICUBIC)
        assert np.array_equal(tile, np.array(expected))

    @pytest.mark.parametrize("arguments", [(0, 10, 0.5), (10, 0, 0.5), (10, 10, 0), (10, 10, float("nan"))])
    def test_impossible_requests(self, slide, arguments):
        with pytest.raises(ValueError, match=r"has no pixel|micrometres"):
            slide.read_region(0, 0, *arguments)


EDGE = (2000, 1920)


@pytest.fixture(scope="module")
def edges(tmp_path_factory):
    """A slide with a dark upper left corner, which ends at EDGE."""

    def corner(xs, ys):
        inside = (xs[None, :] < EDGE[0]) & (ys[:, None] < EDGE[1])
        return np.where(inside[:, :, None], 64, 192).astype(np.uint8).repeat(3, axis=2)

    path = tmp_path_factory.mktemp("slides") / "edges.tif"
    return make_pyramid(path, (4096, 4096), 0.2, levels=(1, 4, 16), content=corner)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    mpp=st.floats(0.2, 4.0),
    # Where in the tile the edge shall be; not so near its ends that the kernel leaves the tile.
    place=st.tuples(st.floats(8, 88), st.floats(8, 88)),
    backend=st.sampled_from(["openslide", "tifffile"]),
)
def test_fields_of_view_are_where_they_should_be_to_half_a_pixel(edges, mpp, place, backend):
    """What lies on the slide at a distance from the tile's corner lies so in the tile."""
    scale = mpp / 0.2
    x, y = (round(edge - at * scale) for edge, at in zip(EDGE, place))
    with open_slide(edges, backend=backend) as opened:
        tile = opened.read_region(x, y, 96, 96, mpp)[:, :, 0].astype(float)
    dark = (192 - tile) / 128
    assert abs(dark[0].sum() * scale - (EDGE[0] - x)) < 0.5
    assert abs(dark[:, 0].sum() * scale - (EDGE[1] - y)) < 0.5


def test_tiles_side_by_side_make_the_slide(tmp_path):
    """At its own mpp the tiles of a grid, put together by their coordinates, are the slide."""
    with open_slide(make_pyramid(tmp_path / "s.tif", (700, 500), 0.5, levels=(1,), content=waves)) as opened:
        grid = make_grid(opened.dimensions, opened.mpp, 0.5, 128, 16)
        canvas = np.zeros((700, 900, 3), np.uint8)
        for x, y in grid.coords:
            canvas[y : y + 128, x : x + 128] = opened.read_region(x, y, 128, 128, 0.5)
    assert np.array_equal(canvas[:500, :700], pixels(waves, (700, 500)))


class TestBadTiles:
    @pytest.mark.parametrize("backend", ["openslide", "tifffile"])
    def test_one_bad_tile_leaves_the_others_readable(self, tmp_path, backend):
        path = corrupt_tile(make_pyramid(tmp_path / "s.tif", (1000, 600), 0.5, content=waves), index=1)
        known = pixels(waves, (1000, 600))
        with open_slide(path, backend=backend) as opened:
            for _ in range(2):
                with pytest.raises(TileError, match=r"pixel \(300, 10\) cannot be read: \w+") as caught:
                    opened.read_region(300, 10, 100, 100, 0.5)
                assert (caught.value.x, caught.value.y) == (300, 10)
                assert np.array_equal(opened.read_region(600, 10, 100, 100, 0.5), known[10:110, 600:700])

    def test_real_slide(self, data_root, tmp_path):
        path = tmp_path / "bad.svs"
        path.write_bytes((data_root / "slides" / "cmu-1-small-region.svs").read_bytes())
        with open_slide(corrupt_tile(path, index=0)) as opened:
            with pytest.raises(TileError):
                opened.read_region(0, 0, 224, 224, 0.499)
            good = opened.read_region(777, 1234, 224, 224, 0.499)
        original = data_root / "slides" / "cmu-1-small-region.svs"
        assert np.array_equal(good, np.array(reference(original, 777, 1234, 224, 224, 0)))

    @pytest.mark.parametrize("backend", ["openslide", "tifffile"])
    def test_threads_may_share_a_slide_with_bad_tiles(self, tmp_path, backend):
        path = corrupt_tile(make_pyramid(tmp_path / "s.tif", (1000, 600), 0.5, content=waves), index=1)
        known = pixels(waves, (1000, 600))

        def read(x):
            try:
                return x, opened.read_region(x, 10, 60, 60, 0.5)
            except TileError:
                return x, None

        with open_slide(path, backend=backend) as opened, ThreadPoolExecutor(4) as threads:
            for x, tile in threads.map(read, [0, 300, 600, 900, 350, 100] * 15):
                if x in (300, 350):
                    assert tile is None
                else:
                    assert np.array_equal(tile, known[10:70, x : x + 60])

    def test_the_error_survives_a_change_of_process(self):
        error = pickle.loads(pickle.dumps(TileError(3, 4, "torn")))
        assert (error.x, error.y, error.reason) == (3, 4, "torn")
        assert "torn" in str(error)

    def test_the_file_is_not_opened_again_for_each_tile(self, pyramid, monkeypatch):
        opened = []
        real = openslide.OpenSlide.__init__
        monkeypatch.setattr(
            openslide.OpenSlide, "__init__", lambda self, path: (opened.append(path), real(self, path))[1]
        )
        with open_slide(pyramid) as slide:
            for x in range(0, 1000, 100):
                slide.read_region(x, 0, 64, 64, 0.5)
        assert len(opened) == 1


class TestThumbnail:
    def test_it_shows_the_slide_at_a_known_downsample(self, slide):
        image, downsample = slide.thumbnail(300)
        assert image.shape == (220, 300, 3)
        assert downsample == 5.0
        expected = slide.read_region(0, 0, 300, 220, MPP * 5)
        assert np.abs(image.astype(int) - expected).mean() < 0.1

    def test_a_small_slide_is_not_enlarged(self, slide):
        image, downsample = slide.thumbnail(5000)
        assert (image.shape, downsample) == ((1100, 1500, 3), 1.0)
        assert np.array_equal(image[:256, :512], pixels(waves, SIZE)[:256, :512])

    def test_pieces_join_where_the_slide_has_no_pyramid(self, tmp_path):
        path = make_pyramid(tmp_path / "s.tif", (2500, 2200), 0.25, levels=(1,), content=tissue)
        with open_slide(path) as opened:
            image, downsample = opened.thumbnail(250)
            whole = opened.read_region(0, 0, 250, 220, 2.5)
        assert (image.shape, downsample) == ((220, 250, 3), 10.0)
        # At the pieces' borders kernels end, which dims nothing and moves nothing.
        assert np.abs(image.astype(int) - whole).max() < 40
        assert np.abs(image.astype(int) - whole).mean() < 0.2

    def test_the_overview_has_a_fixed_resolution_and_bounded_size(self, slide):
        overview = slide.overview()
        assert overview.mpp == 8.0
        assert overview.image.shape == (35, 47, 3)
        assert slide.overview(most_pixels=200).image[:, :, 0].size <= 300

    def test_bad_places_are_marked_and_nothing_else(self, tmp_path):
        path = make_pyramid(tmp_path / "s.tif", (2048, 2048), 0.5, levels=(1,), content=waves)
        with open_slide(corrupt_tile(path, index=9)) as opened:
            overview = opened.overview()
        rows, columns = np.nonzero(overview.unreadable)
        # Tile 9 of 8 x 8 is the second of the second row: px 256 to 512 of level 0, 16 to 32 of the overview.
        assert (rows.min(), columns.min()) == (16, 16)
        assert rows.max() < 48
        assert columns.max() < 48
        assert overview.unreadable.mean() < 0.05
