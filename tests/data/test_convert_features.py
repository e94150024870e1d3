"""Conversions to and from CLAM and TRIDENT: nothing is lost, nothing is guessed, one bad file stops no other."""

import os
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ssmamba_models.data.clam import read_tensor
from ssmamba_models.data.convert import convert_features
from ssmamba_models.data.features import read_slide_features, write_slide_features

h5py = pytest.importorskip("h5py", reason="feature files need the [wsi] extra")

GEOMETRY = {
    "patch_size": 224,
    "patch_size_level0": 443.5643564356436,
    "overlap": 16,
    "level0_mpp": 0.2525,
    "target_mpp": 0.5,
    "level0_width": 90001,
    "level0_height": 70001,
    "name": "slide 组织",
}
PROVENANCE = {"model": "hf-hub:a/b", "dtype": "bfloat16", "mean": [0.5, 0.25], "versions": ["x", "y"], "seed": 3}


def make_rows(count=30, dim=5, seed=0):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((count, dim)).astype(np.float32), rng.integers(0, 70000, (count, 2))


def write_ours(path, count=30, dim=5, dtype="float32", grid=False, geometry=GEOMETRY, provenance=PROVENANCE):
    path.parent.mkdir(parents=True, exist_ok=True)
    features, coords = make_rows(count, dim)
    maps = np.random.default_rng(1).random((count, 2, 3, dim), dtype=np.float32) if grid else None
    options = {"coords_attributes": geometry, "attributes": provenance, "dtype": dtype}
    with write_slide_features(path, dim, grid_shape=(2, 3) if grid else None, **options) as writer:
        writer.append(features, coords, maps)
    return path


def write_clam(folder, name="case1.A", attributes=None, tensor=True, rows=None):
    """What CLAM's extract_features_fp writes; `attributes` on coords, which its feature files do not have."""
    features, coords = make_rows() if rows is None else rows
    for part in ("h5_files", "pt_files"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    with h5py.File(folder / "h5_files" / f"{name}.h5", "w") as file:
        for part, rows in (("features", features), ("coords", coords.astype(np.int32))):
            file.create_dataset(part, data=rows, maxshape=(None, rows.shape[1]), chunks=(1, rows.shape[1]))
        file["coords"].attrs.update(attributes or {})
    if tensor:
        torch.save(torch.from_numpy(features), folder / "pt_files" / f"{name}.pt")
    return folder


def write_clam_coords(folder, name="case1.A", **changes):
    """What CLAM's create_patches_fp writes: level 1 of a slide of 40000 x 20001 px, a quarter of its side."""
    folder.mkdir(parents=True, exist_ok=True)
    with h5py.File(folder / f"{name}.h5", "w") as file:
        file["coords"] = make_rows()[1]
        sides = np.array([10000, 5000])
        file["coords"].attrs.update(
            {"patch_size": 256, "patch_level": 1, "downsample": (4.0, 4.0002), "downsampled_level_dim": sides,
             "level_dim": sides, "name": name, "save_path": "/somewhere", **changes}
        )  # fmt: skip
    return folder


WHOLE = {"patch_size": 256, "patch_level": 0, "level_dim": (80000, 80000)}

TRIDENT_ATTRIBUTES = {
    "patch_size": 256.0,
    "patch_size_level0": 512.0,
    "level0_magnification": 40,
    "target_magnification": 20.0,
    "overlap": 0.0,
    "name": "case1",
    "savetodir": "/somewhere/20x",
    "level0_width": 80000.0,
    "level0_height": np.int32(70000),
}


def write_trident(path, leading=False, encoder="uni_v1", drop=(), rows=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    features, coords = make_rows() if rows is None else rows
    with h5py.File(path, "w") as file:
        file["features"] = features[None] if leading else features
        file["coords"] = coords
        file["features"].attrs.update({"name": "case1", "savetodir": "/somewhere", "encoder": encoder})
        file["coords"].attrs.update({key: v for key, v in TRIDENT_ATTRIBUTES.items() if key not in drop})
    return path


def convert(source, out, source_layout, target_layout, **options):
    summary = convert_features(source, out, source_layout=source_layout, target_layout=target_layout, **options)
    assert summary.failed == []
    return summary


def why_not(source, out, source_layout, target_layout, **options):
    summary = convert_features(source, out, source_layout=source_layout, target_layout=target_layout, **options)
    ((_, reason),) = summary.failed
    assert summary.written == []
    return reason


def files_in(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def everything(path):
    """All data sets and attributes of an HDF5 file, with their types."""

    def exact(value):
        return (getattr(value, "dtype", type(value)), np.asarray(value).tolist())

    with h5py.File(path) as file:
        found = {("", key): exact(value) for key, value in file.attrs.items()}
        for name, dataset in file.items():
            found[name] = (dataset.dtype, dataset.shape, dataset[...].tolist())
            found.update({(name, key): exact(value) for key, value in dataset.attrs.items()})
    return found


class TestOursAndBack:
    @settings(max_examples=12, deadline=None)
    @given(
        layout=st.sampled_from(["clam", "trident"]),
        count=st.integers(1, 600),
        dim=st.integers(1, 7),
        dtype=st.sampled_from(["float32", "float16"]),
        grid=st.booleans(),
    )
    def test_the_way_there_and_back_gives_the_same_bytes(self, tmp_path_factory, layout, count, dim, dtype, grid):
        folder = tmp_path_factory.mktemp("ours")
        ours = write_ours(folder / "ours" / "s.h5", count, dim, dtype, grid)
        convert(folder / "ours", folder / "there", "ssmamba", layout)
        ((_, back),) = convert(folder / "there", folder / "back", layout, "ssmamba").written
        assert back.read_bytes() == ours.read_bytes()

    def test_through_both(self, tmp_path):
        ours = write_ours(tmp_path / "s.h5", dtype="float16", grid=True)
        convert(ours, tmp_path / "clam", "ssmamba", "clam")
        convert(tmp_path / "clam", tmp_path / "trident", "clam", "trident")
        ((_, back),) = convert(tmp_path / "trident", tmp_path / "back", "trident", "ssmamba").written
        assert back.read_bytes() == ours.read_bytes()

    def test_clam_reads_what_it_expects(self, tmp_path):
        ours = write_ours(tmp_path / "s.h5", dtype="float16")
        convert(ours, tmp_path / "clam", "ssmamba", "clam")
        assert files_in(tmp_path / "clam") == ["h5_files/s.h5", "pt_files/s.pt"]
        features = read_slide_features(ours).features.astype(np.float32)
        tensor = torch.load(tmp_path / "clam/pt_files/s.pt", weights_only=True)
        assert tensor.dtype == torch.float32
        assert np.array_equal(tensor.numpy(), features)
        with h5py.File(tmp_path / "clam/h5_files/s.h5") as file:
            assert (file["features"].dtype, file["coords"].dtype) == (np.float32, np.int32)
            assert np.array_equal(file["features"], features)
            attributes = file["coords"].attrs
            assert (attributes["patch_size"], attributes["patch_level"]) == (444, 0)
            assert attributes["name"] == GEOMETRY["name"]
            assert attributes["downsample"].tolist() == [1, 1]
            assert attributes["level_dim"].tolist() == [90001, 70001]
            assert all(isinstance(item, h5py.Dataset) for item in file.values())

    def test_trident_reads_what_it_expects(self, tmp_path):
        ours = write_ours(tmp_path / "s.h5")
        convert(ours, tmp_path / "trident", "ssmamba", "trident")
        assert files_in(tmp_path / "trident") == ["features_hf-hub_a_b/s.h5"]
        with h5py.File(tmp_path / "trident/features_hf-hub_a_b/s.h5") as file:
            assert np.array_equal(file["features"], make_rows()[0])
            assert file["coords"].dtype == np.int64
            attributes = dict(file["coords"].attrs)
            assert file["features"].attrs["encoder"] == "hf-hub:a/b"
        expected = {"patch_size": 224, "patch_size_level0": 444, "overlap": 16, "level0_width": 90001}
        expected |= {"level0_magnification": 40, "target_magnification": 20, "name": GEOMETRY["name"]}
        assert {name: attributes[name] for name in expected} == expected

    def test_two_conversions_give_the_same_bytes(self, tmp_path):
        ours = write_ours(tmp_path / "s.h5")
        for out in ("1", "2"):
            convert(ours, tmp_path / out, "ssmamba", "clam")
        for name in ("h5_files/s.h5", "pt_files/s.pt"):
            assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()

    def test_coordinates_beyond_int32(self, tmp_path):
        with write_slide_features(tmp_path / "s.h5", 1, coords_attributes=GEOMETRY, attributes=PROVENANCE) as writer:
            writer.append(np.ones((1, 1), np.float32), np.array([[2**31, 0]]))
        assert "do not fit the layout's int32" in why_not(tmp_path / "s.h5", tmp_path / "out", "ssmamba", "clam")
        assert files_in(tmp_path) == ["s.h5"]


class TestClam:
    GIVEN = {"level0_mpp": 0.25, "overlap": 0, "model": "uni_v1"}  # noqa: RUF012

    def test_with_its_coordinate_files(self, tmp_path):
        write_clam(tmp_path / "clam")
        write_clam_coords(tmp_path / "patches")
        options = {"coords": tmp_path / "patches", "given": self.GIVEN}
        ((_, out),) = convert(tmp_path / "clam", tmp_path / "out", "clam", "ssmamba", **options).written
        assert out == tmp_path / "out" / "case1.A.h5"
        read = read_slide_features(out)
        features, coords = make_rows()
        assert np.array_equal(read.features, features)
        assert np.array_equal(read.coords, coords)
        assert (read.patch_size, read.overlap, read.name) == (256, 0, "case1.A")
        assert read.patch_size_level0 == pytest.approx(1024.0256)
        assert read.target_mpp == pytest.approx(0.25 * 1024.0256 / 256)
        assert (read.level0_width, read.level0_height) == (40000, 20001)
        assert read.attributes == {"converted_from": "clam", "model": "uni_v1"}

    @pytest.mark.parametrize("attributes", [{}, {"patch_size": 256, "patch_level": 1, "downsample": (4.0, 4.0)}])
    def test_theirs_and_back(self, tmp_path, attributes):
        write_clam(tmp_path / "clam", attributes={**attributes, "custom": np.float32(0.1), "who": b"bytes"})
        write_clam_coords(tmp_path / "patches")
        with h5py.File(tmp_path / "clam/h5_files/case1.A.h5", "a") as file:
            file["more"] = np.arange(3)
            file.attrs["on the file"] = ["a", "b"]
        options = {"coords": tmp_path / "patches", "given": self.GIVEN}
        convert(tmp_path / "clam", tmp_path / "ours", "clam", "ssmamba", **options)
        convert(tmp_path / "ours", tmp_path / "back", "ssmamba", "clam")
        before = everything(tmp_path / "clam/h5_files/case1.A.h5")
        after = everything(tmp_path / "back/h5_files/case1.A.h5")
        assert {key: after.get(key) for key in before} == before
        tensors = [torch.load(tmp_path / f"{part}/pt_files/case1.A.pt", weights_only=True) for part in ("clam", "back")]
        assert torch.equal(*tensors)
        assert tensors[0].dtype == tensors[1].dtype

    def test_what_is_missing_is_named_with_the_options(self, tmp_path):
        write_clam(tmp_path / "clam")
        reason = why_not(tmp_path / "clam", tmp_path / "out", "clam", "ssmamba")
        for option in ("--mpp-override", "--mpp or", "--mpp-csv", "--tile-size", "--overlap", "level0_width"):
            assert option in reason
        reason = why_not(
            tmp_path / "clam", tmp_path / "out", "clam", "ssmamba",
            coords=write_clam_coords(tmp_path / "patches"), given={"overlap": 0},
        )  # fmt: skip
        assert "does not say level0_mpp (micrometres per pixel of level 0): give --mpp-override" in reason
        assert "--tile-size" not in reason
        assert files_in(tmp_path / "out") == []

    def test_all_by_hand(self, tmp_path):
        write_clam(tmp_path / "clam", name="a")
        given = {"patch_size": 256, "target_mpp": 0.5, "overlap": 0}
        table = {"a": {"level0_mpp": 0.25, "level0_width": 100, "level0_height": 90}}
        options = {"given": given, "table": table}
        ((_, out),) = convert(tmp_path / "clam", tmp_path / "out", "clam", "ssmamba", **options).written
        assert read_slide_features(out).patch_size_level0 == 512

    def test_a_fork_that_shrinks_patches(self, tmp_path):
        write_clam(tmp_path / "clam")
        patches = write_clam_coords(tmp_path / "patches", patch_size=512, patch_level=0, downsample=(1.0, 1.0),
                                    custom_downsample=2)  # fmt: skip
        options = {"coords": patches, "given": self.GIVEN}
        ((_, out),) = convert(tmp_path / "clam", tmp_path / "out", "clam", "ssmamba", **options).written
        read = read_slide_features(out)
        assert (read.patch_size, read.patch_size_level0, read.target_mpp) == (256, 512, 0.5)

    def test_other_coordinates(self, tmp_path):
        write_clam(tmp_path / "clam", rows=make_rows(seed=1))
        write_clam_coords(tmp_path / "patches")
        reason = why_not(tmp_path / "clam", tmp_path / "out", "clam", "ssmamba", coords=tmp_path / "patches")
        assert "are not those of" in reason

    def test_pixels_that_are_not_square(self, tmp_path):
        write_clam(tmp_path / "clam", attributes={"patch_size": 256, "downsample": (4.0, 2.0)})
        assert "square" in why_not(tmp_path / "clam", tmp_path / "out", "clam", "ssmamba", given=self.GIVEN)

    def test_a_tensor_file_that_runs_code_is_refused_and_does_not_run(self, tmp_path):
        marker = tmp_path / "ran"

        class Malicious:
            def __reduce__(self):
                return os.mkdir, (str(marker),)

        write_clam(tmp_path / "clam", attributes=WHOLE, tensor=False)
        for name, dump in (("zip", torch.save), ("raw", lambda value, path: path.write_bytes(pickle.dumps(value, 2)))):
            path = tmp_path / "clam/pt_files/case1.A.pt"
            dump(Malicious(), path)
            reason = why_not(tmp_path / "clam", tmp_path / "out", "clam", "ssmamba", given=self.GIVEN)
            assert "is not a plain tensor" in reason, name
        assert not marker.exists()
        assert files_in(tmp_path / "out") == []

    def test_a_tensor_file_of_other_features(self, tmp_path):
        write_clam(tmp_path / "clam", attributes=WHOLE)
        path = tmp_path / "clam/pt_files/case1.A.pt"
        for tensor, message in (
            (torch.zeros(30, 5), "does not hold the features of"),
            (torch.zeros(29, 5), r"holds (29, 5) features"),
            (torch.zeros(30), "expected float32 (N, D)"),
            (torch.zeros(30, 5, dtype=torch.bfloat16), "expected float32 (N, D)"),
            ({"features": torch.zeros(30, 5)}, "holds a dict"),
        ):
            torch.save(tensor, path)
            assert message in why_not(tmp_path / "clam", tmp_path / "out", "clam", "ssmamba", given=self.GIVEN)

    def test_old_tensor_files_are_read(self, tmp_path):
        torch.save(torch.ones(2, 3), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
        assert read_tensor(tmp_path / "old.pt").tolist() == [[1] * 3] * 2

    def test_a_tensor_file_alone(self, tmp_path):
        write_clam(tmp_path / "clam")
        with pytest.raises(ValueError, match="has no coordinates"):
            convert(tmp_path / "clam/pt_files/case1.A.pt", tmp_path / "out", "clam", "ssmamba")


class TestTrident:
    GIVEN = {"level0_mpp": 0.2525}  # noqa: RUF012

    def test_floats_become_ints(self, tmp_path):
        path = write_trident(tmp_path / "job/20x_256px_0px_overlap/features_uni_v1/case1.h5")
        (tmp_path / "job/20x_256px_0px_overlap/patches").mkdir()
        (tmp_path / "job/20x_256px_0px_overlap/patches/case1_patches.h5").write_bytes(path.read_bytes())
        ((_, out),) = convert(tmp_path / "job", tmp_path / "out", "trident", "ssmamba", given=self.GIVEN).written
        assert out == tmp_path / "out/20x_256px_0px_overlap/features_uni_v1/case1.h5"
        read = read_slide_features(out)
        names = ("patch_size", "patch_size_level0", "overlap", "level0_width", "level0_height")
        assert [getattr(read, name) for name in names] == [256, 512, 0, 80000, 70000]
        assert all(type(getattr(read, name)) is int for name in names)
        assert (read.level0_mpp, read.target_mpp) == (0.2525, 0.505)
        assert (read.attributes["model"], read.attributes["converted_from"]) == ("uni_v1", "trident")

    @pytest.mark.parametrize("leading", [False, True])
    @pytest.mark.parametrize("half", [False, True])
    def test_theirs_and_back(self, tmp_path, leading, half):
        features, coords = make_rows()
        rows = (features.astype(np.float16 if half else np.float32), coords.astype(np.int32 if half else np.float64))
        path = write_trident(tmp_path / "features_uni_v1/case1.h5", leading, rows=rows)
        given = {"target_mpp": 0.5}
        ((_, ours),) = convert(path, tmp_path / "ours", "trident", "ssmamba", given=given).written
        read = read_slide_features(ours)
        assert np.array_equal(read.features, rows[0])
        assert read.coords.dtype == np.int64
        assert read.level0_mpp == 0.25
        ((_, back),) = convert(ours, tmp_path / "back", "ssmamba", "trident").written
        assert back == tmp_path / "back/features_uni_v1/case1.h5"
        before, after = everything(path), everything(back)
        assert {key: after.get(key) for key in before} == before
        ((_, again),) = convert(back, tmp_path / "again", "trident", "ssmamba").written
        assert again.read_bytes() == ours.read_bytes()

    def test_the_encoder_of_the_folder(self, tmp_path):
        path = write_trident(tmp_path / "features_conch_v15/case1.h5", encoder="None")
        ((_, out),) = convert(path, tmp_path / "out", "trident", "ssmamba", given=self.GIVEN).written
        assert read_slide_features(out).attributes["model"] == "conch_v15"

    def test_the_mpp_is_never_guessed_from_the_magnification(self, tmp_path):
        path = write_trident(tmp_path / "features_uni_v1/case1.h5")
        assert "give --mpp-override, --mpp or --mpp-csv" in why_not(path, tmp_path / "out", "trident", "ssmamba")

    def test_old_files_do_not_say_the_size(self, tmp_path):
        path = write_trident(tmp_path / "features_uni_v1/case1.h5", drop=("level0_width", "level0_height"))
        reason = why_not(path, tmp_path / "out", "trident", "ssmamba", given=self.GIVEN)
        assert "level0_width (width of level 0 in pixels): give a column level0_width in --mpp-csv" in reason

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            ({"level0_mpp": 0.25, "patch_size": 224}, "says that patch_size is 256, not 224"),
            ({"level0_mpp": 0.25, "model": "other"}, "says that the model is 'uni_v1', not 'other'"),
            ({"level0_mpp": 0.25, "target_mpp": 1.0}, "give one mpp"),
            ({"level0_mpp": -1}, "level0_mpp is -1, expected a number above 0"),
        ],
    )
    def test_options_that_contradict_the_file(self, tmp_path, given, message):
        path = write_trident(tmp_path / "features_uni_v1/case1.h5")
        assert message in why_not(path, tmp_path / "out", "trident", "ssmamba", given=given)

    @pytest.mark.parametrize(
        ("rows", "message"),
        [
            ((np.zeros((3, 4), np.float32), np.zeros((2, 2), int)), "3 features, but 2 coords"),
            ((np.zeros((3, 4)), np.zeros((3, 2), int)), "features are float64"),
            ((np.zeros(3, np.float32), np.zeros((3, 2), int)), r"shape (3,)"),
            ((np.zeros((0, 4), np.float32), np.zeros((0, 2), int)), "no tile"),
            ((np.zeros((3, 4), np.float32), np.zeros((3, 3), int)), "expected numbers (N, 2)"),
            ((np.zeros((3, 4), np.float32), np.full((3, 2), 0.5)), "no whole numbers"),
        ],
    )
    def test_rows_that_do_not_fit(self, tmp_path, rows, message):
        path = write_trident(tmp_path / "features_uni_v1/case1.h5", rows=rows)
        assert message in why_not(path, tmp_path / "out", "trident", "ssmamba", given=self.GIVEN)

    def test_foreign_data_sets_are_kept(self, tmp_path):
        path = write_trident(tmp_path / "features_uni_v1/case1.h5")
        with h5py.File(path, "a") as file:
            file["scores"] = np.arange(30.0)
            file["scores"].attrs["unit"] = "um"
        ((_, ours),) = convert(path, tmp_path / "ours", "trident", "ssmamba", given=self.GIVEN).written
        assert len(read_slide_features(ours).coords) == 30
        ((_, back),) = convert(ours, tmp_path / "back", "ssmamba", "trident").written
        assert everything(back)["scores"] == everything(path)["scores"]
        assert everything(back)[("scores", "unit")] == everything(path)[("scores", "unit")]


class TestFolders:
    def test_a_bad_file_does_not_stop_the_others(self, tmp_path):
        for name in ("a", "b", "c"):
            write_ours(tmp_path / "in" / f"{name}.h5")
        os.truncate(tmp_path / "in/b.h5", 3000)
        summary = convert_features(
            tmp_path / "in", tmp_path / "out", source_layout="ssmamba", target_layout="clam"
        )
        assert [path.name for path, _ in summary.written] == ["a.h5", "c.h5"]
        ((path, reason),) = summary.failed
        assert path.name == "b.h5"
        assert "cut short" in reason
        assert files_in(tmp_path / "out") == ["h5_files/a.h5", "h5_files/c.h5", "pt_files/a.pt", "pt_files/c.pt"]

    def test_existing_outputs_are_kept(self, tmp_path):
        write_ours(tmp_path / "in/a.h5")
        convert(tmp_path / "in", tmp_path / "out", "ssmamba", "clam")
        before = (tmp_path / "out/h5_files/a.h5").read_bytes()
        write_ours(tmp_path / "other/a.h5", dim=3)
        assert "--overwrite" in why_not(tmp_path / "other", tmp_path / "out", "ssmamba", "clam")
        assert (tmp_path / "out/h5_files/a.h5").read_bytes() == before
        (tmp_path / "out/h5_files/a.h5").unlink()
        assert "a.pt" in why_not(tmp_path / "other", tmp_path / "out", "ssmamba", "clam")
        assert files_in(tmp_path / "out") == ["pt_files/a.pt"]
        convert(tmp_path / "other", tmp_path / "out", "ssmamba", "clam", overwrite=True)
        assert torch.load(tmp_path / "out/pt_files/a.pt", weights_only=True).shape == (30, 3)

    def test_folders_are_kept_apart(self, tmp_path):
        for folder in ("0.5mpp/features_m", "1mpp/features_m"):
            write_ours(tmp_path / "job" / folder / "a.h5")
        convert(tmp_path / "job", tmp_path / "trident", "ssmamba", "trident")
        assert files_in(tmp_path / "trident") == ["0.5mpp/features_m/a.h5", "1mpp/features_m/a.h5"]
        convert(tmp_path / "job", tmp_path / "clam", "ssmamba", "clam")
        convert(tmp_path / "clam", tmp_path / "back", "clam", "ssmamba")
        assert files_in(tmp_path / "back") == ["0.5mpp/features_m/a.h5", "1mpp/features_m/a.h5"]

    def test_an_output_never_takes_its_sources_place(self, tmp_path):
        path = write_ours(tmp_path / "features_m/a.h5")
        before = path.read_bytes()
        assert "its own place" in why_not(tmp_path, tmp_path, "ssmamba", "trident", overwrite=True)
        assert path.read_bytes() == before

    def test_no_model_for_tridents_folder(self, tmp_path):
        path = write_ours(tmp_path / "a.h5", provenance={})
        assert "give --model" in why_not(path, tmp_path / "out", "ssmamba", "trident")
        convert(path, tmp_path / "out", "ssmamba", "trident", given={"model": "m"})
        assert files_in(tmp_path / "out") == ["features_m/a.h5"]

    @pytest.mark.parametrize(
        ("source", "target", "options", "message"),
        [
            ("clam", "clam", {}, "nothing to convert"),
            ("stamp", "clam", {}, "unknown layout 'stamp'"),
            ("ssmamba", "clam", {"given": {"level0_mpp": 1}}, "only --model"),
            ("trident", "clam", {"coords": "here"}, "are CLAM's"),
        ],
    )
    def test_bad_options(self, tmp_path, source, target, options, message):
        path = write_ours(tmp_path / "a.h5")
        with pytest.raises(ValueError, match=message):
            convert(path, tmp_path / "out", source, target, **options)
        assert files_in(tmp_path) == ["a.h5"]

    def test_bad_places(self, tmp_path):
        path = write_ours(tmp_path / "in/a.h5")
        (tmp_path / "empty").mkdir()
        with pytest.raises(FileNotFoundError, match="does not exist"):
            convert(tmp_path / "none", tmp_path / "out", "ssmamba", "clam")
        with pytest.raises(ValueError, match=r"no \.h5 file found"):
            convert(tmp_path / "empty", tmp_path / "out", "ssmamba", "clam")
        with pytest.raises(NotADirectoryError, match="name a folder"):
            convert(path, path, "ssmamba", "clam")
        with pytest.raises(FileNotFoundError, match="--coords"):
            convert(path, tmp_path / "out", "clam", "ssmamba", coords=tmp_path / "none")
