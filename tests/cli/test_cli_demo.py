"""`ssmamba demo`: a picture, from nothing or from the user's image."""

import os
import re

import pytest
from PIL import Image

pytestmark = pytest.mark.usefixtures("one_thread")

QUICK = ("--model", "test_ssmamba", "--img-size", 128)


def test_without_an_image(ssmamba, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = ssmamba("demo", *QUICK)
    assert result.exit_code == 0, result.output
    assert os.listdir(tmp_path) == ["ssmamba_demo.png"]
    assert Image.open("ssmamba_demo.png").width > 3 * 512
    assert str(tmp_path / "ssmamba_demo.png") in result.stdout
    assert re.search(r"features \(1, \d+\) in \d+ ms; tokens \(8, 8, \d+\)", result.stdout)
    assert "random weights" in result.stderr


def test_with_an_image_and_a_point_and_over_an_older_picture(ssmamba, tmp_path):
    image, out = tmp_path / "a.jpg", tmp_path / "out.png"
    Image.new("L", (300, 200), 90).save(image)
    for point in ((5, 5), (100, 100)):
        result = ssmamba("demo", image, "--out", out, "--point", *point, *QUICK)
        assert result.exit_code == 0, result.output
        assert str(image) in result.stdout


def test_packaged_weights_are_used_unless_random_ones_are_asked_for(ssmamba, tmp_path):
    few = ("--out", tmp_path / "o.png", "--model", "ssmamba_tiny", "--img-size", 64)
    for more, random in ((), False), (("--random",), True), (("--pretrained",), False):
        result = ssmamba("demo", *few, *more)
        assert result.exit_code == 0, result.output
        assert ("random weights" in result.stderr) is random


def test_help_names_the_formats_and_each_is_written(ssmamba, tmp_path):
    said = ssmamba("demo", "--help").stdout
    for suffix in (".png", ".jpg", ".tif", ".webp"):
        assert suffix in said
        result = ssmamba("demo", "--out", tmp_path / f"o{suffix}", *QUICK)
        assert result.exit_code == 0, result.output
        assert Image.open(tmp_path / f"o{suffix}").width > 3 * 512


def test_a_model_of_timm(ssmamba, tmp_path):
    result = ssmamba("demo", "--out", tmp_path / "o.png", "--model", "test_vit", "--img-size", 160)
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["{tmp}/none.png"], "none.png' does not exist"),
        (["{tmp}/text.png"], "cannot be read: not an image"),
        (["--out", "{tmp}/no/o.png"], "mkdir -p"),
        (["--out", "{tmp}/picture"], "needs a suffix"),
        (["--out", "{tmp}/o.png", "--point", "500", "0"], "outside the image"),
        (["--out", "{tmp}/o.png", "--model", "nonsense"], "unknown model 'nonsense'"),
        (["--out", "{tmp}/o.png", "--img-size", "0"], "'--img-size': 0 is not in the range"),
    ],
)
def test_bad_input(ssmamba, tmp_path, monkeypatch, arguments, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.png").write_text("no image")
    result = ssmamba("demo", *QUICK, *(text.format(tmp=tmp_path) for text in arguments))
    assert result.exit_code == 2
    assert said in result.stderr
    assert os.listdir(tmp_path) == ["text.png"]


def test_the_image_itself_is_not_replaced(ssmamba, tmp_path):
    image = tmp_path / "tile.png"
    Image.new("RGB", (64, 64), "pink").save(image)
    before = image.read_bytes()
    result = ssmamba("demo", image, "--out", image, *QUICK)
    assert result.exit_code == 2
    assert "would replace the image itself; give another --out" in result.stderr
    assert image.read_bytes() == before


def test_an_unknown_tag_is_named(ssmamba, tmp_path):
    result = ssmamba("demo", "--model", "ssmamba_tiny.wrong_tag", "--out", tmp_path / "d.png")
    assert result.exit_code == 2
    assert "unknown weights 'ssmamba_tiny.wrong_tag'" in result.output
