"""`ssmamba evaluate`: exit codes, what is said on which stream, and what is left on the disk."""

import json
import os
import shutil

import pytest

pytest.importorskip("sklearn", reason="evaluation needs the [eval] extra")
pytest.importorskip("matplotlib", reason="evaluation needs the [eval] extra")
pytest.importorskip("h5py", reason="feature files need the [wsi] extra")

pytestmark = pytest.mark.usefixtures("one_thread")

QUICK = ("--folds", 3, "--seeds", 1, "--img-size", 32, "--workers", 0, "--device", "cpu")


def test_two_encoders_and_a_baseline(ssmamba, labelled_tiles, tmp_path):
    out = tmp_path / "report"
    models = ("--model", "random=test_ssmamba", "--model", "color_histogram", "--init", "none")
    result = ssmamba("evaluate", "--data", labelled_tiles, *models, "--task", "two=solid,stroma", "--out", out, *QUICK)
    assert result.exit_code == 0, result.output
    report = json.loads((out / "report.json").read_text())
    figure = report["tasks"][0]["results"]["random"]["linear_probe"]["metrics"]["macro_f1"]
    assert f"random           linear probe {figure['value']:.3f}" in result.stdout
    assert "two (solid, stroma)" in result.stdout
    assert f"wrote {out}/report.md" in result.stdout
    assert sorted(os.listdir(out)) == ["features", "plots", "report.json", "report.md"]
    # A second report in its place has to be asked for.
    again = ssmamba("evaluate", "--data", labelled_tiles, *models, "--out", out, *QUICK)
    assert again.exit_code == 2
    assert "--overwrite" in again.stderr
    assert json.loads((out / "report.json").read_text()) == report


def test_unreadable_tiles_are_listed_and_the_rest_is_scored(ssmamba, labelled_tiles, tmp_path):
    tiles = shutil.copytree(labelled_tiles, tmp_path / "tiles")
    shutil.copy(tiles / "stroma" / "stroma_001.png", tiles / "stroma" / "stroma_003.png")
    (tiles / "stroma" / "stroma_001.png").write_text("no image")
    out = tmp_path / "report"
    result = ssmamba("evaluate", "--data", tiles, "--model", "color_histogram", "--out", out, *QUICK, "--quiet")
    assert (result.exit_code, result.stdout) == (1, "")
    assert "unreadable: stroma/stroma_001.png: not an image" in result.stderr
    assert "1 of 10 tiles unreadable and not scored" in result.stderr
    assert (out / "report.md").is_file()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--data", "{tmp}/none", "--model", "color_histogram"], "does not exist"),
        (["--data", "{tiles}/solid", "--model", "color_histogram"], "have no labels"),
        (["--data", "{tiles}", "--model", "ssmamba_smal@none"], "unknown model 'ssmamba_smal'; did you mean"),
        (["--data", "{tiles}", "--model", "test_ssmamba"], "have; write test_ssmamba@RUN"),
        (["--data", "{tiles}", "--model", "test_ssmamba@{tmp}/run"], "run' does not exist"),
        (["--data", "{tiles}", "--model", "test_ssmamba", "--init", "{tmp}/run"], "run' does not exist"),
        (["--data", "{tiles}", "--model", "a b=test_ssmamba"], "not of the form [LABEL=]NAME[@INIT]"),
        (["--data", "{tiles}", "--model", "color_histogram", "--task", "x=solid,fat"], "(there is: glands, solid,"),
        (["--data", "{tiles}", "--model", "color_histogram", "--folds", "4"], "has 3 groups, too few for 4 folds"),
        (["--data", "{tiles}", "--model", "test_ssmamba@none", "--device", "cuda:99"], "--device cpu"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(ssmamba, labelled_tiles, tmp_path, arguments, said):
    filled = [text.format(tmp=tmp_path, tiles=labelled_tiles) for text in arguments]
    if "--folds" not in filled:
        filled += ["--folds", "3"]
    result = ssmamba("evaluate", *filled, "--out", tmp_path / "report")
    assert result.exit_code == 2
    assert said in result.stderr
    assert result.stderr.startswith("Error: ")
    assert len(result.stderr.splitlines()) == 1
    assert os.listdir(tmp_path) == []


def test_a_group_in_two_splits(ssmamba, labelled_tiles, tmp_path):
    tiles = shutil.copytree(labelled_tiles, tmp_path / "tiles")
    rows = ["solid/solid_000.png,solid,p1,train", "stroma/stroma_000.png,stroma,p1,val"]
    (tiles / "manifest.csv").write_text("\n".join(["path,label,group,split", *rows]))
    result = ssmamba("evaluate", "--data", tiles, "--model", "color_histogram", "--out", tmp_path / "report")
    assert result.exit_code == 2
    assert "the group 'p1' is in two splits" in result.stderr


@pytest.mark.slow
def test_colour_tells_much_of_real_lung_tiles_on_the_groups_held_out(ssmamba, data_root, tmp_path):
    from ssmamba_models.data.labelled import read_tiles

    tiles = read_tiles(data_root / "lc25000").select(classes=["lung_aca", "lung_n", "lung_scc"])
    chosen = range(0, len(tiles), 12)
    (tmp_path / "tiles").mkdir()
    rows = ["path,label,group,split"]
    for place in chosen:
        path = tiles.paths[place]
        (tmp_path / "tiles" / path).parent.mkdir(exist_ok=True)
        (tmp_path / "tiles" / path).symlink_to((tiles.root / path).resolve())
        rows.append(f"{path},{tiles.labels[place]},{tiles.groups[place]},{tiles.splits[place]}")
    (tmp_path / "tiles" / "manifest.csv").write_text("\n".join(rows))
    out = tmp_path / "report"
    models = ("--model", "color_histogram", "--img-size", 112, "--workers", 0)
    result = ssmamba("evaluate", "--data", tmp_path / "tiles", *models, "--seeds", 2, "--out", out)
    assert result.exit_code == 0, result.output
    (task,) = json.loads((out / "report.json").read_text())["tasks"]
    assert task["protocol"]["test_split"] == "val"
    figure = task["results"]["color_histogram"]["linear_probe"]["metrics"]["macro_f1"]
    assert figure["low"] > 0.5
    assert figure["value"] > 0.7
