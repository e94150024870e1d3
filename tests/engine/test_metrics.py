"""Metrics against scikit-learn, and where some are not defined."""

import pytest
import torch

from ssmamba_models.engine.metrics import classification_metrics

pytest.importorskip("torchmetrics", reason="metrics need the [train] extra")
sklearn_metrics = pytest.importorskip("sklearn.metrics", reason="compares with scikit-learn")


def draw(count, classes, seed=0):
    torch.manual_seed(seed)
    targets = torch.randint(classes, (count,))
    logits = torch.randn(count, classes, dtype=torch.float64) + 1.5 * torch.eye(classes)[targets]
    return targets, logits.softmax(1)


@pytest.mark.parametrize("classes", [2, 5])
def test_agree_with_sklearn(classes):
    targets, probabilities = draw(200, classes)
    predictions = probabilities.argmax(1)
    names = [f"c{i}" for i in range(classes)]
    found = classification_metrics(targets, probabilities, names)
    assert found["accuracy"] == pytest.approx(sklearn_metrics.accuracy_score(targets, predictions))
    assert found["macro_f1"] == pytest.approx(sklearn_metrics.f1_score(targets, predictions, average="macro"))
    areas = [sklearn_metrics.roc_auc_score(targets == i, probabilities[:, i]) for i in range(classes)]
    assert found["macro_auc"] == pytest.approx(sum(areas) / classes)
    assert found["confusion_matrix"] == sklearn_metrics.confusion_matrix(targets, predictions).tolist()
    table = sklearn_metrics.classification_report(targets, predictions, target_names=names, output_dict=True)
    for i, name in enumerate(names):
        row = found["per_class"][name]
        assert row["support"] == table[name]["support"]
        assert row["auc"] == pytest.approx(areas[i])
        assert row["f1"] == pytest.approx(table[name]["f1-score"])
        assert (row["precision"], row["recall"]) == pytest.approx((table[name]["precision"], table[name]["recall"]))


def test_a_class_without_tiles_counts_in_no_mean():
    targets, probabilities = draw(60, 2)
    wider = torch.cat([probabilities, torch.zeros(60, 1)], dim=1)
    two, three = classification_metrics(targets, probabilities, "ab"), classification_metrics(targets, wider, "abc")
    assert three["macro_f1"] == pytest.approx(two["macro_f1"])
    assert three["macro_auc"] == pytest.approx(two["macro_auc"])
    assert three["per_class"]["c"] == {"precision": 0, "recall": 0, "f1": 0, "auc": None, "support": 0}


def test_one_class_alone_has_no_area():
    found = classification_metrics(torch.zeros(4, dtype=torch.long), torch.tensor([[0.9, 0.1]] * 4), "ab")
    assert (found["accuracy"], found["macro_f1"], found["macro_auc"]) == (1, 1, None)
