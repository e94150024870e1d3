"""Slide vectors are scored fairly: patients undivided, few labels a part of many, baselines beside, bad input named."""

import csv
import json
import os
from pathlib import Path

import numpy as np
import pytest

for package in ("sklearn", "matplotlib", "h5py"):
    pytest.importorskip(package, reason="evaluation needs the [eval] and [wsi] extras")
pytestmark = pytest.mark.usefixtures("one_thread")

from ssmamba_models.data.labelled import LabelledTiles  # noqa: E402
from ssmamba_models.data.slide_vectors import SlideVectors, read_slide_vectors, write_slide_vectors  # noqa: E402
from ssmamba_models.data.synthetic_slides import write_synthetic_slides  # noqa: E402
from ssmamba_models.evaluation.slide_data import LabelledSlides, label_slides  # noqa: E402
from ssmamba_models.evaluation.slide_evaluate import evaluate_slides  # noqa: E402
from ssmamba_models.evaluation.slide_scoring import (  # noqa: E402
    SlideSettings,
    SlideTask,
    budget_size,
    logistic_regression,
    score_vectors,
    stratified_order,
)

QUICK = SlideSettings(folds=3, repeats=2, budgets=("6", "50%", "all"), draws=50)
SLIDES, PATIENTS, WIDTH = 48, 24, 8


def slide_names(count=SLIDES):
    return tuple(f"slide_{number:02d}" for number in range(count))


def label_of(number):
    return "ab"[number // 2 % 2]


def vectors_of(signal, seed=0, baselines=None, slides=SLIDES):
    """Noise, with `signal` in the first channel of class b."""
    values = np.random.default_rng(seed).standard_normal((slides, WIDTH)).astype(np.float32)
    values[:, 0] += [signal * (label_of(number) == "b") for number in range(slides)]
    return SlideVectors(slide_names(slides), values, baselines or {}, {"model": "made"})


@pytest.fixture
def labels(tmp_path):
    """48 slides of 24 patients, two each, of two classes."""
    return write_labels(tmp_path / "labels.csv", [(n, label_of(i), f"p{i // 2}") for i, n in enumerate(slide_names())])


def write_labels(path, rows, header=("slide", "label", "patient")):
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return path


@pytest.fixture
def embeddings(tmp_path):
    """A file of vectors that tell the classes apart, with baselines that do not."""
    noise = {"mean_pool": vectors_of(0, seed=1).embeddings, "random_encoder": vectors_of(0, seed=2).embeddings}
    write_slide_vectors(tmp_path / "good.h5", vectors_of(4, baselines=noise))
    return tmp_path / "good.h5"


def auc_of(report, label, budget="all", method="logistic_regression"):
    (entry,) = [e for e in report["results"][label] if (e["budget"], e["method"]) == (budget, method)]
    return entry["metrics"]["auc"]["value"]


class TestReport:
    def test_a_signal_is_found_and_the_baselines_stand_beside(self, embeddings, labels, tmp_path):
        report = evaluate_slides({"mine": embeddings}, labels, tmp_path / "report", settings=QUICK)
        assert list(report["results"]) == ["mine", "mean_pool", "random_encoder"]
        assert [entry["baseline"] for entry in report["vectors"]] == [False, True, True]
        for method in ("logistic_regression", "knn"):
            assert auc_of(report, "mine", method=method) > 0.95
            assert 0.25 < auc_of(report, "mean_pool", method=method) < 0.75
        for entries in report["results"].values():
            for entry in entries:
                assert set(entry["metrics"]) == {"auc", "macro_f1", "balanced_accuracy", "accuracy"}
                for figure in entry["metrics"].values():
                    assert figure["low"] <= figure["value"] <= figure["high"]
                    assert len(figure["seeds"]) == 2
        assert sorted(os.listdir(tmp_path / "report")) == ["plots", "report.json", "report.md"]
        assert sorted(os.listdir(tmp_path / "report" / "plots")) == ["learning_curve.png", "map.png"]
        assert json.loads((tmp_path / "report" / "report.json").read_text()) == report
        text = (tmp_path / "report" / "report.md").read_text()
        assert "| mine | `made` | 8 |" in text
        assert f"{auc_of(report, 'mine'):.3f}" in text
        won = [row for row in report["comparisons"] if (row["first"], row["second"]) == ("mine", "mean_pool")]
        assert {row["budget"] for row in won} == {"6", "50%", "all"}
        assert all(row["low"] > 0 for row in won if row["budget"] == "all" and row["metric"] == "auc")

    def test_it_is_the_same_again(self, embeddings, labels, tmp_path):
        reports = [
            evaluate_slides({"mine": embeddings}, labels, tmp_path / name, settings=QUICK, plots=False)
            for name in ("one", "two")
        ]
        assert reports[0] == reports[1]

    def test_a_report_is_replaced_only_if_asked(self, embeddings, labels, tmp_path):
        arguments = {"settings": SlideSettings(folds=2, repeats=1, budgets=("all",), draws=5), "plots": False}
        evaluate_slides({"mine": embeddings}, labels, tmp_path / "report", **arguments)
        with pytest.raises(FileExistsError, match="--overwrite"):
            evaluate_slides({"mine": embeddings}, labels, tmp_path / "report", **arguments)
        evaluate_slides({"mine": embeddings}, labels, tmp_path / "report", **arguments, overwrite=True)

    def test_several_files_share_a_baseline(self, embeddings, labels, tmp_path):
        other = read_slide_vectors(embeddings)
        changed = {**other.baselines, "random_encoder": vectors_of(0, seed=9).embeddings}
        write_slide_vectors(tmp_path / "other.h5", SlideVectors(other.slides, other.embeddings, changed, {}))
        files = {"one": ("a", other), "two": ("b", read_slide_vectors(tmp_path / "other.h5"))}
        names = [one.label for one in label_slides(files, labels).sets]
        assert names == ["one", "two", "mean_pool", "random_encoder (one)", "random_encoder (two)"]
        clash = {"mean_pool": ("a", other)}
        assert [one.label for one in label_slides(clash, labels).sets] == [
            "mean_pool", "mean_pool (mean_pool)", "random_encoder",
        ]  # fmt: skip

    def test_vectors_have_length_one(self, embeddings, labels):
        slides = label_slides({"mine": ("f", read_slide_vectors(embeddings))}, labels)
        for one in slides.sets:
            assert np.allclose(np.linalg.norm(one.vectors, axis=1), 1)

    def test_splits_of_the_labels_are_used(self, embeddings, tmp_path):
        rows = [(n, label_of(i), f"p{i // 2}", "test" if i >= 32 else "train") for i, n in enumerate(slide_names())]
        table = write_labels(tmp_path / "split.csv", rows, ("slide", "label", "group", "split"))
        report = evaluate_slides({"mine": embeddings}, table, tmp_path / "report", settings=QUICK, plots=False)
        assert (report["protocol"]["kind"], report["protocol"]["scored_slides"]) == ("split", 16)
        entry = next(e for e in report["results"]["mine"] if e["budget"] == "all")
        assert entry["train_slides"] == [32, 32]

    def test_without_patients_the_report_warns(self, embeddings, tmp_path):
        rows = [(name, label_of(number)) for number, name in enumerate(slide_names())]
        table = write_labels(tmp_path / "l.csv", rows, ("slide", "label"))
        report = evaluate_slides({"mine": embeddings}, table, tmp_path / "report", settings=QUICK, plots=False)
        assert any("no column patient" in note for note in report["notes"])


class TestFolds:
    def test_patients_are_never_divided_and_budgets_nest(self, embeddings, labels):
        slides = label_slides({"mine": ("f", read_slide_vectors(embeddings))}, labels)
        task = SlideTask(slides, QUICK)
        units = np.asarray(slides.table.units)
        draws = {budget: task.training(budget) for budget in task.budgets}
        for seed, folds in enumerate(task.protocol.seeds):
            for number, fold in enumerate(folds):
                small, half, whole = (set(draws[budget][seed][number].tolist()) for budget in ("6", "50%", "all"))
                assert len(small) == 6
                assert len(half) == round(len(fold.train) / 2)
                assert whole == set(fold.train.tolist())
                assert small <= half <= whole
                assert {label_of(place) for place in small} == {"a", "b"}
                assert not set(units[sorted(whole)]) & set(units[fold.test])

    def test_budgets_that_a_fold_cannot_fill_are_left_out(self, embeddings, labels):
        slides = label_slides({"mine": ("f", read_slide_vectors(embeddings))}, labels)
        task = SlideTask(slides, SlideSettings(folds=3, repeats=1, draws=5))
        assert (task.budgets, task.left_out) == (("25%", "all"), ("50", "100"))
        with pytest.raises(ValueError, match="--budgets all"):
            SlideTask(slides, SlideSettings(folds=3, repeats=1, budgets=("50",), draws=5))

    def test_an_order_begins_with_every_class_and_keeps_their_shares(self):
        labels = np.array([0] * 60 + [1] * 30 + [2] * 3)
        for seed in range(5):
            order = stratified_order(labels, np.random.default_rng(seed))
            assert sorted(order) == list(range(93))
            assert set(labels[order[:3]]) == {0, 1, 2}
            assert np.bincount(labels[order[:46]])[:2] == pytest.approx([30, 15], abs=2)

    @pytest.mark.parametrize(("budget", "size"), [("50", 50), ("25%", 10), ("1%", 1), ("all", 40)])
    def test_budget_size(self, budget, size):
        assert budget_size(budget, 40) == size

    @pytest.mark.parametrize("budget", ["", "0", "-3", "100%", "half", "2.5"])
    def test_no_budget(self, budget):
        with pytest.raises(ValueError, match=r"budget .* is no number of training slides"):
            SlideSettings(budgets=(budget,))

    def test_logistic_regression_is_scikit_learns(self):
        from sklearn.linear_model import LogisticRegression

        rng = np.random.default_rng(0)
        train, test, labels = rng.standard_normal((40, 5)), rng.standard_normal((7, 5)), np.array([0, 1, 1, 1] * 10)
        expected = LogisticRegression(C=10, class_weight="balanced", max_iter=5000).fit(train, labels)
        assert np.allclose(logistic_regression(train, labels, test), expected.predict_proba(test), atol=1e-4)


def test_draws_of_patients_with_slides_of_both_classes_lie_about_the_value(monkeypatch):
    """Each patient tells its two slides apart, and patients do not agree on the scale."""
    patients = np.repeat(np.arange(30), 2)
    truth = np.tile([0, 1], 30)
    table = LabelledTiles(
        Path("labels.csv"), slide_names(60), tuple("ab"[one] for one in truth), tuple(f"p{one:02}" for one in patients)
    )
    task = SlideTask(LabelledSlides(table, (), (), ()), SlideSettings(repeats=1, budgets=("all",), draws=1000))
    scores = np.random.default_rng(0).normal(size=30)[patients] * 50 + truth
    monkeypatch.setattr(f"{SlideTask.__module__}.logistic_regression", lambda train, labels, test: test)
    entry = score_vectors(task, np.stack([-scores, scores], axis=1))[0]
    won = [
        scores[ours] > scores[theirs]
        for fold in task.protocol.seeds[0]
        for ours in fold.test[truth[fold.test] == 1]
        for theirs in fold.test[truth[fold.test] == 0]
    ]
    auc = entry.estimates["auc"]
    assert auc.value == pytest.approx(np.mean(won))
    assert auc.draws.mean() == pytest.approx(auc.value, abs=0.01)


class TestNpy:
    @pytest.fixture
    def npy(self, tmp_path):
        np.save(tmp_path / "other.npy", vectors_of(4).embeddings.astype(np.float64))
        (tmp_path / "ids.txt").write_text("\n".join(slide_names()) + "\n")
        return tmp_path / "other.npy"

    def test_with_ids(self, npy, labels, tmp_path):
        report = evaluate_slides(
            {"other": npy}, labels, tmp_path / "report", ids=tmp_path / "ids.txt", settings=QUICK, plots=False
        )
        assert auc_of(report, "other") > 0.95
        assert any("no baseline stands beside" in note for note in report["notes"])

    def test_ids_from_a_csv(self, npy, tmp_path):
        write_labels(tmp_path / "ids.csv", [(name, 1) for name in slide_names()], ("slide", "n"))
        assert read_slide_vectors(npy, tmp_path / "ids.csv").slides == slide_names()

    def test_baselines_from_feature_files(self, tmp_path):
        table = write_synthetic_slides(tmp_path / "features", patients=8, tiles=10, feature_dim=6, shift=8.0)
        names = sorted(path.stem for path in (tmp_path / "features").glob("*.h5"))
        np.save(tmp_path / "v.npy", np.random.default_rng(0).standard_normal((len(names), 3)))
        (tmp_path / "ids.txt").write_text("\n".join(names))
        report = evaluate_slides(
            {"v": tmp_path / "v.npy"}, table, tmp_path / "report", ids=tmp_path / "ids.txt",
            features=tmp_path / "features", settings=SlideSettings(2, 2, ("all",), draws=10), plots=False,
        )  # fmt: skip
        assert list(report["results"]) == ["v", "mean_pool", "random_encoder"]
        assert auc_of(report, "mean_pool") > 0.8

    @pytest.mark.parametrize(
        ("ids", "message"),
        [
            (None, "name its rows with --ids"),
            ("\n".join(slide_names()[:-1]), "names 47 slides, and .* has 48 rows"),
            ("\n".join([*slide_names()[:-1], "slide_00"]), "'slide_00' is there twice"),
            ("", "names no slide"),
        ],
    )
    def test_bad_ids(self, npy, tmp_path, ids, message):
        if ids is not None:
            (tmp_path / "bad.txt").write_text(ids)
        with pytest.raises(ValueError, match=message):
            read_slide_vectors(npy, None if ids is None else tmp_path / "bad.txt")

    @pytest.mark.parametrize(
        "values",
        [
            np.zeros(48),
            np.zeros((48, 0)),
            np.full((48, 2), np.nan),
            np.full((48, 2), 1e300),
            np.array([["a"]] * 48),
        ],
    )
    def test_bad_values(self, npy, tmp_path, values):
        np.save(tmp_path / "bad.npy", values)
        with pytest.raises(ValueError, match=r"expected numbers|are NaN or infinite"):
            read_slide_vectors(tmp_path / "bad.npy", tmp_path / "ids.txt")

    def test_no_npy(self, npy, tmp_path):
        (tmp_path / "bad.npy").write_bytes(b"nothing")
        with pytest.raises(ValueError, match=r"is no \.npy file"):
            read_slide_vectors(tmp_path / "bad.npy", tmp_path / "ids.txt")
        with open(tmp_path / "many.npy", "wb") as file:
            np.savez(file, values=np.ones((48, 2)))
        with pytest.raises(ValueError, match=r"is an archive \(\.npz\)"):
            read_slide_vectors(tmp_path / "many.npy", tmp_path / "ids.txt")
        with pytest.raises(FileNotFoundError, match="do not exist"):
            read_slide_vectors(tmp_path / "none.npy", tmp_path / "ids.txt")

    def test_ids_belong_to_npy_files(self, embeddings, labels, tmp_path):
        with pytest.raises(ValueError, match="no embeddings are one"):
            evaluate_slides({"a": embeddings}, labels, tmp_path / "report", ids=labels)
        assert not (tmp_path / "report").exists()


class TestBadLabels:
    def rows(self):
        return [(name, label_of(number), f"p{number // 2}") for number, name in enumerate(slide_names())]

    def refuse(self, embeddings, tmp_path, rows, message, header=("slide", "label", "patient"), **options):
        table = write_labels(tmp_path / "bad.csv", rows, header)
        with pytest.raises(ValueError, match=message):
            evaluate_slides({"mine": embeddings}, table, tmp_path / "report", settings=QUICK, **options)
        assert not (tmp_path / "report").exists()

    def test_unknown_slides(self, embeddings, tmp_path):
        rows = [*self.rows(), ("elsewhere", "a", "p99")]
        self.refuse(embeddings, tmp_path, rows, r"1 of the 49 slides .* have no vector .*'elsewhere'.*--skip-missing")
        report = evaluate_slides(
            {"m": embeddings}, tmp_path / "bad.csv", tmp_path / "out", settings=QUICK, skip_missing=True, plots=False
        )
        assert report["data"]["missing"] == ["elsewhere"]

    def test_slides_twice(self, embeddings, tmp_path):
        self.refuse(embeddings, tmp_path, [*self.rows(), ("slide_03.svs", "a", "p1")], "'slide_03.svs' twice")

    def test_columns_and_classes(self, embeddings, tmp_path):
        self.refuse(embeddings, tmp_path, self.rows(), "has no column 'label'", ("slide", "class", "patient"))
        self.refuse(embeddings, tmp_path, [(n, "a", p) for n, _, p in self.rows()], "two are needed")
        self.refuse(embeddings, tmp_path, [(n, "", p) for n, _, p in self.rows()], "line 2: the label is empty")

    def test_a_patient_in_two_splits(self, embeddings, tmp_path):
        rows = [(*row, "test" if number == 1 else "train") for number, row in enumerate(self.rows())]
        self.refuse(embeddings, tmp_path, rows, "'p0' is in two splits", ("slide", "label", "patient", "split"))

    def test_too_few_patients(self, embeddings, tmp_path):
        rows = [(name, label_of(number), f"p{number // 2 % 4}") for number, name in enumerate(slide_names())]
        self.refuse(embeddings, tmp_path, rows, "has 2 groups, too few for 3 folds; add slides of")

    def test_slides_without_a_label_are_left_out_and_named(self, embeddings, tmp_path):
        table = write_labels(tmp_path / "some.csv", self.rows()[4:])
        report = evaluate_slides({"m": embeddings}, table, tmp_path / "out", settings=QUICK, plots=False)
        assert report["data"]["unlabelled"] == list(slide_names()[:4])
        assert report["data"]["slides"] == 44


class TestVectorFiles:
    def test_round_trip_and_same_bytes(self, tmp_path):
        vectors = vectors_of(1, baselines={"mean_pool": np.ones((SLIDES, 3), np.float32)})
        for name in ("a.h5", "b.h5"):
            write_slide_vectors(tmp_path / name, vectors)
        back = read_slide_vectors(tmp_path / "a.h5")
        assert back.slides == vectors.slides
        assert np.array_equal(back.embeddings, vectors.embeddings)
        assert np.array_equal(back.baselines["mean_pool"], vectors.baselines["mean_pool"])
        assert back.attributes == {"model": "made"}
        assert (tmp_path / "a.h5").read_bytes() == (tmp_path / "b.h5").read_bytes()
        with pytest.raises(FileExistsError, match="--overwrite"):
            write_slide_vectors(tmp_path / "a.h5", vectors)

    def test_other_files(self, embeddings, tmp_path):
        import h5py

        write_synthetic_slides(tmp_path / "f", patients=2, tiles=4, feature_dim=3)
        with pytest.raises(ValueError, match=r"has no data set 'embeddings' .*slide-embed"):
            read_slide_vectors(tmp_path / "f" / "slide_000_0.h5")
        (tmp_path / "cut.h5").write_bytes(embeddings.read_bytes()[:500])
        with pytest.raises(ValueError, match=r"cut short|not an HDF5"):
            read_slide_vectors(tmp_path / "cut.h5")
        for name, made in {"slides": np.arange(3), "embeddings": np.float32(1), "baselines": np.ones((3, 2))}.items():
            with h5py.File(tmp_path / f"{name}.h5", "w") as file:
                columns = {"slides": ["a", "b", "c"], "embeddings": np.ones((3, 2)), name: made}
                for column, values in columns.items():
                    file.create_dataset(column, data=values)
            with pytest.raises(ValueError, match=rf"{name} is .*slide-embed"):
                read_slide_vectors(tmp_path / f"{name}.h5")
        with pytest.raises(ValueError, match=r"no \.npy file; --ids"):
            read_slide_vectors(embeddings, tmp_path / "ids.txt")
