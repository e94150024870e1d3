"""Feature files that are broken, or that another program wrote: read right, or refused by name."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mutations import broken_bytes, odd_tables
from reading import budget

h5py = pytest.importorskip("h5py", reason="feature files need the [wsi] extra")

from ssmamba_models.data.convert import convert_features  # noqa: E402
from ssmamba_models.data.features import write_slide_features  # noqa: E402
from ssmamba_models.data.slide_vectors import SlideVectors, write_slide_vectors  # noqa: E402
from ssmamba_models.data.tile_files import write_features  # noqa: E402

GEOMETRY = {"patch_size": 64, "patch_size_level0": 128, "overlap": 0, "level0_mpp": 0.5, "target_mpp": 1.0}
GEOMETRY |= {"level0_width": 1000, "level0_height": 1000, "name": "a"}
ROWS = 6
RNG = np.random.default_rng(0)
FEATURES = RNG.normal(size=(ROWS, 5)).astype(np.float32)
COORDS = (np.arange(2 * ROWS).reshape(ROWS, 2) * 128).astype(np.int64)


@pytest.fixture(scope="module")
def contents(tmp_path_factory):
    """Name -> bytes of a sound file of each kind."""
    folder = tmp_path_factory.mktemp("sound")
    attributes = {"model": "test_ssmamba", "weights_sha256": "0" * 64, "mean": [0.5, 0.5, 0.5]}
    with write_slide_features(
        folder / "slide.h5", 5, coords_attributes=GEOMETRY, attributes=attributes, grid_shape=(2, 2, 3), bag_tiles=4
    ) as writer:
        writer.append(FEATURES, COORDS, RNG.normal(size=(ROWS, 2, 2, 3)).astype(np.float32))
        writer.append_bag(FEATURES[:4], COORDS[:4])
    with write_features(folder / "tiles.h5", 5, labelled=True, attributes=attributes) as writer:
        writer.append(FEATURES, [f"{row}.png" for row in range(ROWS)], list("aabbcc"))
    names = tuple(f"s{row}" for row in range(ROWS))
    write_slide_vectors(folder / "vectors.h5", SlideVectors(names, FEATURES, {"mean": FEATURES[:, :2]}, attributes))
    for layout in ("clam", "trident"):
        convert_features(folder / "slide.h5", folder / layout, source_layout="ssmamba", target_layout=layout)
    found = {path.name: path.read_bytes() for path in folder.glob("*.h5")}
    found |= {f"{layout}.h5": next((folder / layout).rglob("*.h5")).read_bytes() for layout in ("clam", "trident")}
    np.save(folder / "v.npy", FEATURES)
    return {**found, "v.npy": (folder / "v.npy").read_bytes()}


@pytest.mark.parametrize(
    ("reader", "name"),
    [
        ("read_slide_feature_file", "slide.h5"),
        ("read_bag", "slide.h5"),
        ("check_features", "slide.h5"),
        ("read_tile_features", "tiles.h5"),
        ("read_vectors", "vectors.h5"),
        ("read_vectors", "v.npy"),
        ("convert_clam", "clam.h5"),
        ("convert_trident", "trident.h5"),
        ("convert_ours", "slide.h5"),
    ],
)
def test_broken_bytes(readers, place, contents, reader, name):
    path = place / name
    (place / "ids.txt").write_text("".join(f"s{row}\n" for row in range(ROWS)))
    path.write_bytes(contents[name])
    assert readers.check(reader, path)["how"] == "result"

    @budget(12)
    @given(broken_bytes(contents[name]))
    def check(content):
        path.write_bytes(content)
        readers.check(reader, path)

    check()


_TYPES = ["f4", "f4", "f2", "f8", "i4", "i8", "u1", "S3", "?", "c8", h5py.string_dtype(), [("a", "f4")]]
_SHAPES = [
    (ROWS, 5),
    (ROWS, 5),
    (ROWS, 2),
    (ROWS,),
    (),
    (0, 5),
    (ROWS, 0),
    (1, ROWS, 5),
    (ROWS - 1, 2),
    (ROWS, 2, 2, 3),
]
_VALUES = [
    0,
    1,
    -1,
    64,
    128,
    0.5,
    1e300,
    np.nan,
    np.inf,
    "",
    "a",
    "64",
    b"\xff\xfe",
    [1, 2],
    ["a"],
    np.int8(3),
    True,
    [],
    2**63,
]


@st.composite
def recipes(draw):
    """What to write: data set -> (shape, type, fill), or None for a group, and attributes in place of sound ones."""
    datasets = {}
    for name, sound in {
        "features": ((ROWS, 5), "f4"),
        "coords": ((ROWS, 2), "i8"),
        "grid": ((ROWS, 2, 2, 3), "f4"),
        "bags/features": ((1, 4, 5), "f4"),
        "bags/coords": ((1, 4, 2), "i8"),
        "paths": ((ROWS,), h5py.string_dtype()),
        "labels": ((ROWS,), h5py.string_dtype()),
        "embeddings": ((ROWS, 5), "f4"),
        "slides": ((ROWS,), h5py.string_dtype()),
        "baselines": None,
        "baselines/mean": ((ROWS, 2), "f4"),
    }.items():
        fate = draw(st.sampled_from(["sound"] * 6 + ["odd", "odd", "group", "missing", "huge"]))
        shape = sound[0] if sound else (ROWS,)
        if fate == "sound":
            datasets[name] = (*sound, "contiguous") if sound else None
        elif fate == "odd":
            kind = draw(st.sampled_from(_TYPES))
            datasets[name] = (
                draw(st.sampled_from([shape, *_SHAPES])),
                kind,
                draw(st.sampled_from(["contiguous", "bad"])),
            )
        elif fate == "huge" and shape:
            datasets[name] = ((2**40, *shape[1:]), sound[1] if sound else "f4", "chunked")
        elif fate == "group":
            datasets[name] = None
    attributes = draw(st.dictionaries(st.sampled_from(sorted(GEOMETRY)), st.sampled_from([*_VALUES, None]), max_size=2))
    return (
        datasets,
        attributes,
        draw(st.dictionaries(st.sampled_from(["model", "mean", "é", ""]), st.sampled_from(_VALUES), max_size=2)),
    )


def write_recipe(path, datasets, geometry, attributes):
    with h5py.File(path, "w") as file:
        for name, how in sorted(datasets.items()):
            if name in file or (
                name.count("/") and not isinstance(file.get(name.split("/")[0], {}), (h5py.Group, dict))
            ):
                continue
            if how is None:
                file.create_group(name)
                continue
            shape, kind, way = how
            if way == "chunked":
                file.create_dataset(name, shape, kind, chunks=(256, *shape[1:]))
            else:
                file.create_dataset(name, data=_values(shape, kind, way))
        coords = file.get("coords")
        if coords is not None:
            for key, value in {**GEOMETRY, **geometry}.items():
                if value is not None:
                    coords.attrs[key] = value
        for key, value in attributes.items():
            if key:
                file.attrs[key] = value


def _values(shape, kind, way):
    if kind == h5py.string_dtype():
        texts = np.array([f"t{number}" for number in range(int(np.prod(shape)))], dtype=object).reshape(shape)
        return np.where(texts == "t1", b"\xff\xfe", texts) if way == "bad" else texts
    values = np.arange(int(np.prod(shape)), dtype="f8").reshape(shape)
    if isinstance(kind, list):
        return np.zeros(shape, dtype=kind)
    values = values.astype(kind)
    if way == "bad" and values.size and values.dtype.kind == "f":
        values.flat[0] = np.nan
    return values


@pytest.mark.parametrize(
    "reader",
    [
        "read_slide_feature_file",
        "read_bag",
        "check_features",
        "read_tile_features",
        "read_vectors",
        "convert_clam",
        "convert_trident",
        "convert_ours",
    ],
)
def test_odd_data_sets_and_attributes(readers, place, reader):
    path = place / "odd.h5"

    @budget(12)
    @given(recipes())
    def check(recipe):
        path.unlink(missing_ok=True)
        write_recipe(path, *recipe)
        readers.check(reader, path)

    check()


SLIDES = ["a", "b", "c", "a.tif"]
TABLES = {
    "read_labels": (
        ["slide", "label", "patient", "split"],
        {"slide": SLIDES, "label": ["x", "y"], "patient": ["p", "q"]},
    ),
    "read_table": (["slide", "mpp", "patch_size", "overlap"], {"slide": SLIDES, "mpp": ["0.5"], "patch_size": ["64"]}),
    "read_mpp_table": (["slide", "mpp"], {"slide": SLIDES, "mpp": ["0.5", "0.25"]}),
    "read_id_table": (["slide", "id", "name"], {"slide": SLIDES}),
    "read_predicted": (
        ["slide", "patient", "fold", "label", "tiles", "prediction", "probability_x", "probability_y"],
        {
            "slide": SLIDES,
            "fold": ["0"],
            "tiles": ["5"],
            "label": ["x"],
            "probability_x": ["0.5"],
            "probability_y": ["0.5"],
        },
    ),
    "read_tile_manifest": (["path", "label", "group", "split"], {"path": ["a.png", "b.png"], "label": ["x", "y"]}),
    "read_place_manifest": (
        ["path", "slide", "x", "y", "label"],
        {"path": ["a.png", "b.png"], "slide": ["s"], "x": ["0", "1", "2"], "y": ["0", "1", "2"], "label": ["x", "y"]},
    ),
}


@pytest.mark.parametrize("reader", sorted(TABLES))
def test_odd_tables(readers, place, reader):
    path = place / ("manifest.csv" if "manifest" in reader else "table.csv")
    for name in ("a.png", "b.png"):
        (place / name).touch()

    @budget(40)
    @given(odd_tables(*TABLES[reader]))
    def check(content):
        path.write_bytes(content)
        readers.check(reader, path, name=str(place))

    check()
