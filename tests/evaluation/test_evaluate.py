"""An evaluation from tiles to report: every figure is what a direct computation gives, in all three places."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from ssmamba_models.data.synthetic import write_synthetic_tiles
from ssmamba_models.data.tile_files import read_features
from ssmamba_models.evaluation import evaluate as evaluate_module
from ssmamba_models.evaluation.embedding import Embedding
from ssmamba_models.evaluation.evaluate import evaluate
from ssmamba_models.evaluation.model_choice import parse_models
from ssmamba_models.evaluation.settings import Settings
from ssmamba_models.evaluation.tasks import parse_task

pytest.importorskip("sklearn", reason="evaluation needs the [eval] extra")
pytest.importorskip("matplotlib", reason="evaluation needs the [eval] extra")
pytest.importorskip("h5py", reason="feature files need the [wsi] extra")

MODELS = ("random=test_ssmamba@none", "color_histogram")
TASKS = (parse_task("three=glands,solid,stroma"), parse_task("two=glands,stroma"))
QUICK = Settings(folds=3, seeds=2, episodes=10, draws=50, magnification=True)
SMALL = Embedding(img_size=32, workers=0, device="cpu", progress=False)


@pytest.fixture(scope="module")
def tiles(tmp_path_factory):
    """36 tiles, three to a group; one of them cannot be read."""
    folder = write_synthetic_tiles(tmp_path_factory.mktemp("tiles"), tiles_per_kind=12, size=32)
    rows = [
        f"{path.relative_to(folder)},{path.parent.name},{path.stem[:-3]}{int(path.stem[-3:]) // 3}"
        for path in sorted(folder.rglob("*.png"))
    ]
    (folder / "manifest.csv").write_text("\n".join(["path,label,group", *rows]))
    (folder / "solid" / "solid_004.png").write_text("no image")
    return folder


@pytest.fixture(scope="module")
def run(tiles, tmp_path_factory):
    """The folder of a report, and what evaluate returned."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("out") / "report"
    report = evaluate(tiles, parse_models(MODELS), out, tasks=TASKS, settings=QUICK, embedding=SMALL)
    torch.set_num_threads(before)
    return out, report


def test_what_is_returned_is_what_is_written(run):
    out, report = run
    assert json.loads((out / "report.json").read_text()) == report
    assert {entry["file"] for entry in report["plots"]} == {path.name for path in (out / "plots").iterdir()}
    assert not list(out.glob(".*"))


def test_unreadable_tiles_are_left_out_and_named(run):
    data = run[1]["data"]
    assert (data["tiles"], data["readable"], data["groups"]) == (36, 35, 12)
    ((entry),) = data["unreadable"]
    assert entry["path"] == "solid/solid_004.png"
    assert "not an image" in entry["reason"]


def test_each_encoder_says_what_it_is(run):
    out, report = run
    random, histogram = report["models"]
    assert [random[key] for key in ("label", "model", "init", "embed_dim")] == ["random", "test_ssmamba", "none", 48]
    assert len(set(random["weights_sha256"])) == 2
    assert histogram["embed_dim"] == 96
    assert len(histogram["weights_sha256"]) == 1
    names = ["color_histogram.h5", "color_histogram.half.h5"]
    names += [f"random{half}.seed{seed}.h5" for half in ("", ".half") for seed in (0, 1)]
    assert sorted(path.name for path in (out / "features").iterdir()) == sorted(names)


def test_a_probes_figures_follow_from_the_features_that_are_kept(run):
    from sklearn.metrics import f1_score, roc_auc_score
    from sklearn.model_selection import StratifiedGroupKFold

    from ssmamba_models.evaluation.linear_probe import linear_probe

    out, report = run
    figures = report["tasks"][0]["results"]["random"]["linear_probe"]["metrics"]
    for seed in (0, 1):
        kept = read_features(out / "features" / f"random.seed{seed}.h5")
        labels = np.unique(kept.labels, return_inverse=True)[1]
        groups = [f"{path[:-7]}{int(path[-7:-4]) // 3}" for path in kept.paths]
        scores = np.zeros((35, 3))
        splitter = StratifiedGroupKFold(3, shuffle=True, random_state=seed)
        for train, test in splitter.split(scores, labels, groups):
            scores[test] = linear_probe(kept.features[train], labels[train], kept.features[test])[0]
        macro_f1 = f1_score(labels, scores.argmax(axis=1), average="macro")
        assert figures["macro_f1"]["seeds"][seed] == pytest.approx(macro_f1, abs=1e-6)
        auc = roc_auc_score(labels, scores, multi_class="ovr")
        assert figures["auc"]["seeds"][seed] == pytest.approx(auc, abs=1e-6)


def test_tasks_are_scored_apart(run):
    three, two = run[1]["tasks"]
    assert (two["name"], two["classes"]) == ("two", ["glands", "stroma"])
    assert (three["protocol"]["test_tiles"], two["protocol"]["test_tiles"]) == (35, 24)
    assert np.array(three["results"]["random"]["knn"]["confusion"]).sum() == 2 * 35
    assert np.array(two["results"]["random"]["knn"]["confusion"]).shape == (2, 2)


def shown(figure, digits=3):
    return f"{figure['value']:.{digits}f} ({figure['low']:.{digits}f} to {figure['high']:.{digits}f})"


def test_the_markdown_shows_the_figures_of_the_json(run):
    out, report = run
    text = (out / "report.md").read_text()
    for task in report["tasks"]:
        section = text.split(f"## Task {task['name']}")[1].split("\n## ")[0]
        for label, results in task["results"].items():
            for method, name in (("linear_probe", "linear probe"), ("knn", "kNN"), ("prototypes", "prototypes")):
                metrics = results[method]["metrics"]
                cells = [shown(metrics[key]) for key in ("macro_f1", "balanced_accuracy", "accuracy", "auc")]
                assert f"| {label} | {name} | {' | '.join(cells)} |" in section
            cells = [shown(entry["metrics"]["macro_f1"]) for entry in results["few_shot"]]
            assert f"| {label} | {' | '.join(cells)} |" in section
            assert shown(results["magnification"]["plain"]["mean_rank"], 1) in section
        (row,) = (
            row for row in task["comparisons"] if (row["method"], row["metric"]) == ("linear_probe", "macro_f1")
        )
        assert f"{row['difference']:+.3f} ({row['low']:+.3f} to {row['high']:+.3f}) | {row['p']:.3f} |" in section
    assert "`solid/solid_004.png`: not an image" in text
    assert report["data"]["sha256"][:12] in text


def test_that_auc_is_over_all_folds_is_told(run, tiles, tmp_path):
    said = "AUC (of the classes and the ROC curves too) ranks the tiles of all folds at once"
    assert said in (run[0] / "report.md").read_text()
    divided = shutil.copytree(tiles, tmp_path / "tiles")
    header, *rows = (divided / "manifest.csv").read_text().splitlines()
    rows = [f"{row},{'test' if row.endswith('3') else 'train'}" for row in rows]
    (divided / "manifest.csv").write_text("\n".join([f"{header},split", *rows]))
    settings = Settings(seeds=1, episodes=4, draws=20)
    evaluate(divided, parse_models(["color_histogram"]), tmp_path / "r", settings=settings, embedding=SMALL)
    assert said not in (tmp_path / "r" / "report.md").read_text()


def test_pictures(run):
    out, report = run
    assert [(entry["task"], entry["kind"]) for entry in report["plots"]] == [
        (task, kind) for task in ("three", "two") for kind in ("confusion", "confusion", "roc", "projection")
    ]
    for entry in report["plots"]:
        with Image.open(out / "plots" / entry["file"]) as picture:
            assert min(picture.size) > 200
            assert len(picture.convert("RGB").getcolors(2**24)) > 10


def test_a_repeated_run_reads_the_features_and_finds_the_same(run, tiles, tmp_path, monkeypatch):
    out, report = run
    again = shutil.copytree(out, tmp_path / "again")

    def never(*arguments, **options):
        raise AssertionError("features were computed")

    monkeypatch.setattr("ssmamba_models.evaluation.tile_features.embed_tiles", never)
    repeated = evaluate(
        tiles, parse_models(MODELS), again, tasks=TASKS, settings=QUICK, embedding=SMALL, overwrite=True
    )
    assert all(entry["features_reused"] for entry in repeated["models"])
    assert repeated["tasks"] == report["tasks"]


def test_a_failure_while_drawing_leaves_the_old_report(run, tiles, tmp_path, monkeypatch):
    out, _ = run
    again = shutil.copytree(out, tmp_path / "again")

    def fail(*arguments):
        raise OSError("disk full")

    monkeypatch.setattr(evaluate_module, "draw_pictures", fail)
    with pytest.raises(OSError, match="disk full"):
        evaluate(tiles, parse_models(MODELS), again, tasks=TASKS, settings=QUICK, embedding=SMALL, overwrite=True)
    assert (again / "report.json").read_bytes() == (out / "report.json").read_bytes()
    assert (again / "report.md").read_bytes() == (out / "report.md").read_bytes()


def test_half_resolution_is_the_tile_at_half_the_input_size(run, tiles):
    from ssmamba_models.data.tiles import read_tile

    out, _ = run
    kept = read_features(out / "features" / "color_histogram.half.h5")
    assert kept.attributes["input_size"] == [3, 16, 16]
    encoder = parse_models(["color_histogram"])[0].load(img_size=16)
    image = encoder.transform(read_tile(tiles / kept.paths[3]))
    assert image.shape == (3, 16, 16)
    assert np.allclose(kept.features[3], encoder.embed(image[None])[0].numpy())


def test_an_encoder_that_cannot_see_half_resolution_is_left_out_of_that_part(tiles, tmp_path):
    models = parse_models(["vit=test_vit@none", "color_histogram"])
    embedding = Embedding(64, workers=0, progress=False)
    report = evaluate(tiles, models, tmp_path / "r", tasks=TASKS[1:], settings=QUICK, embedding=embedding)
    results = report["tasks"][0]["results"]
    assert "magnification" in results["color_histogram"]
    assert "magnification" not in results["vit"]
    assert any("magnification leaves out vit: its random weights are others" in note for note in report["notes"])
    assert "linear_probe" in results["vit"]


def test_without_groups_the_report_says_what_that_means(labelled_tiles, tmp_path):
    report = evaluate(
        labelled_tiles,
        parse_models(["color_histogram"]),
        tmp_path / "r",
        settings=Settings(folds=3, seeds=1, episodes=4, draws=20),
        embedding=SMALL,
    )
    assert any("have no groups" in note for note in report["notes"])
    assert report["tasks"][0]["comparisons"] == []
    assert report["data"]["groups"] is None


def test_what_cannot_be_scored_is_found_before_features_are_computed(tiles, tmp_path, monkeypatch):
    def never(*arguments, **options):
        raise AssertionError("features were computed")

    monkeypatch.setattr("ssmamba_models.evaluation.tile_features.embed_tiles", never)
    cases = (
        (MODELS, {"settings": Settings(folds=5)}, "class 'glands' has 4 groups, too few for 5 folds"),
        (MODELS, {"tasks": [parse_task("x=glands,fat")]}, "class 'fat', which is not there"),
        ((*MODELS, "test_ssmamba@nowhere"), {"settings": QUICK}, "'nowhere' does not exist"),
        ((*MODELS, "test_ssmamba"), {"settings": QUICK}, "no published weights"),
    )
    for models, options, said in cases:
        with pytest.raises((ValueError, OSError), match=said):
            evaluate(tiles, parse_models(models), tmp_path / "r", embedding=SMALL, **options)
    assert list(tmp_path.iterdir()) == []


def test_features_that_are_not_finite_stop_the_run(tiles, tmp_path, monkeypatch):
    from ssmamba_models.evaluation.color_histogram import ColorHistogram

    real = ColorHistogram.forward
    monkeypatch.setattr(ColorHistogram, "forward", lambda self, images: real(self, images) * torch.nan)
    with pytest.raises(ValueError, match="color_histogram returns features that are not finite"):
        evaluate(tiles, parse_models(["color_histogram"]), tmp_path / "r", settings=QUICK, embedding=SMALL)
    assert not (tmp_path / "r" / "report.json").exists()


def test_a_missing_package_names_the_extra(tiles, tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(ImportError, match=r'pip install "ssmamba-models\[eval\]"'):
        evaluate(tiles, parse_models(MODELS), tmp_path / "r")
