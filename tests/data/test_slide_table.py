"""Tables of slides: one reading of rows and names, whoever asks."""

import pytest

from ssmamba_models.data.slide_labels import match_slides
from ssmamba_models.data.slide_table import SLIDE_SUFFIXES, read_slide_table, slide_name


@pytest.mark.parametrize(
    ("file", "name"),
    [("a.svs", "a"), ("d/a.ome.tif", "a"), ("a.OME.TIFF", "a"), ("TCGA-1.F0.svs", "TCGA-1.F0"), ("a", "a")],
)
def test_names(file, name):
    assert slide_name(file) == name


def write(tmp_path, text):
    path = tmp_path / "slides.csv"
    path.write_text(text)
    return path


@pytest.mark.parametrize("file", ["a.svs", "a.ome.tif", "a.OME.TIFF"])
def test_a_file_name_is_found_by_the_name_of_its_features(tmp_path, file):
    table = read_slide_table(write(tmp_path, f"Slide,mpp,level0_width,note\n{file},0.25, 900,x\nb,,,\n"))
    assert table[file] == table["a"] == {"level0_mpp": 0.25, "level0_width": 900}
    assert table["b"] == {}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name,other\na,1\n", "no column mpp and no column slide; expected slide and any of mpp, patch_size"),
        ("name,target_mpp\na,1\n", "no column slide; expected slide and any of"),
        ("slide,mpp\n,fast\n", "line 2: no slide is named"),
        ("slide,mpp\na,1\na.tif,2\n", r"line 3: 'a\.tif' stands in two rows that differ"),
    ],
)
def test_mistakes(tmp_path, text, message):
    with pytest.raises(ValueError, match=rf"slides\.csv'.*{message}"):
        read_slide_table(write(tmp_path, text))


@pytest.mark.parametrize("text", ["slide,level0_mpp,mpp\na,0.25,0.5\n", "slide,mpp,level0_mpp\na,0.5,0.25\n"])
def test_of_two_names_for_one_fact_the_order_of_columns_decides_nothing(tmp_path, text):
    assert read_slide_table(write(tmp_path, text)) == {"a": {"level0_mpp": 0.25}}


def test_what_follows_a_dot_is_a_part_of_the_name(tmp_path):
    table = read_slide_table(write(tmp_path, "slide,mpp\nP1.A,0.25\nP1.B,0.5\n"))
    assert table == {"P1.A": {"level0_mpp": 0.25}, "P1.B": {"level0_mpp": 0.5}}


@pytest.mark.parametrize(
    ("entry", "known", "match"),
    [
        ("S1.1", {"S1"}, None),
        ("S1.1", {"S1", "S1.1"}, "S1.1"),
        ("S1.1.svs", {"S1", "S1.1"}, "S1.1"),
        ("a.svs", {"a", "a.svs"}, "a.svs"),
        ("d/a.h5", {"a"}, "a"),
        ("a.ome.tif", {"a"}, "a"),
        ("a.ome.tif", {"a", "a.ome"}, "a.ome"),
    ],
)
def test_a_line_of_labels_is_of_the_slide_that_it_names(entry, known, match):
    found, missing = match_slides([{"slide": entry, "label": "x"}], known, "labels.csv")
    assert (list(found), missing) == (([], (entry,)) if match is None else ([match], ()))


@pytest.mark.parametrize("suffix", sorted(SLIDE_SUFFIXES))
def test_every_slides_file_name_is_known_by_its_suffix(tmp_path, suffix):
    assert read_slide_table(write(tmp_path, f"slide,mpp\nP1.A{suffix},0.25\n"))["P1.A"] == {"level0_mpp": 0.25}
