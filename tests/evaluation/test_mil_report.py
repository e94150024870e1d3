"""The report of a training of an aggregator: its figures are scikit-learn's, its intervals those of patients."""

from __future__ import annotations

import json

import numpy as np
import pytest

pytest.importorskip("h5py", reason="multiple-instance learning needs the [mil] extra")
pytest.importorskip("sklearn", reason="multiple-instance learning needs the [mil] extra")
pytest.importorskip("matplotlib", reason="multiple-instance learning needs the [mil] extra")
pytestmark = pytest.mark.usefixtures("one_thread")

from sklearn.metrics import accuracy_score, f1_score, roc_auc_score  # noqa: E402

from ssmamba_models.data.synthetic_slides import write_synthetic_slides  # noqa: E402
from ssmamba_models.engine.mil import train_mil  # noqa: E402
from ssmamba_models.engine.mil_config import MilConfig  # noqa: E402
from ssmamba_models.evaluation.mil_report import report_mil  # noqa: E402


@pytest.fixture(scope="module", params=[2, 3])
def trained(request, tmp_path_factory):
    """A run on slides that are hard to tell apart, of two or three classes."""
    root = tmp_path_factory.mktemp("report")
    classes = ("negative", "positive", "worse")[: request.param]
    labels = write_synthetic_slides(root / "f", patients=12, tiles=20, feature_dim=6, shift=2.0, classes=classes)
    config = MilConfig(
        features=str(root / "f"), labels=str(labels), aggregator="mean", folds=2, epochs=3, lr=0.01, device="cpu"
    )
    return root / "run", train_mil(config, root / "run", progress=False)


def test_the_figures_are_those_of_scikit_learn(trained):
    run, result = trained
    report = report_mil(run, draws=200, plots=False)
    actual = [result.classes.index(row.label) for row in result.predictions]
    scores = np.array([row.probabilities for row in result.predictions])
    truth = np.eye(len(result.classes))[actual]
    metrics = report["metrics"]
    assert metrics["auc"]["value"] == pytest.approx(roc_auc_score(truth, scores, average="macro"))
    assert metrics["accuracy"]["value"] == pytest.approx(accuracy_score(actual, scores.argmax(1)))
    assert metrics["macro_f1"]["value"] == pytest.approx(f1_score(actual, scores.argmax(1), average="macro"))
    for figure in metrics.values():
        assert figure["low"] <= figure["value"] <= figure["high"]
    assert np.sum(report["confusion_matrix"]) == len(result.predictions)
    assert sum(row["slides"] for row in report["per_class"]) == len(result.predictions)
    assert sum(fold["slides"]["test"] for fold in report["folds"]) == len(result.predictions)


def test_the_files(trained):
    run, result = trained
    report = report_mil(run, draws=20)
    assert json.loads((run / "report.json").read_text()) == report
    assert [plot["file"] for plot in report["plots"]] == ["confusion.png", "roc.png"]
    text = (run / "report.md").read_text()
    figure = report["metrics"]["auc"]
    assert f"| AUC | {figure['value']:.3f} | {figure['low']:.3f} to {figure['high']:.3f} |" in text
    assert f"{len(result.predictions)} slides of 12 patients" in text
    assert "![roc](plots/roc.png)" in text
    assert not list(run.glob(".report-*"))


def test_more_slides_of_the_same_patients_do_not_narrow_the_interval(trained):
    """Each slide ten times over: the same patients, and so the same intervals."""
    run, _ = trained
    once = report_mil(run, draws=200, plots=False)["metrics"]
    file = run / "predictions.csv"
    before = file.read_text()
    head, *rows = before.splitlines()
    try:
        file.write_text("\n".join([head, *rows * 10]))
        often = report_mil(run, draws=200, plots=False)["metrics"]
    finally:
        file.write_text(before)
    for name, figure in once.items():
        assert often[name]["low"] == pytest.approx(figure["low"], abs=1e-6), name
        assert often[name]["high"] == pytest.approx(figure["high"], abs=1e-6), name


def test_a_run_that_is_not_finished(tmp_path):
    with pytest.raises(FileNotFoundError, match="`ssmamba mil train` writes them"):
        report_mil(tmp_path)
    with pytest.raises(ValueError, match="draws is 0"):
        report_mil(tmp_path, draws=0)
