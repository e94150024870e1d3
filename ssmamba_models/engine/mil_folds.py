"""Which slides an aggregator learns from, which end its training, and which it is tested on; patients stay whole."""

from __future__ import annotations

import warnings
from collections import Counter, defaultdict
from dataclasses import dataclass

import numpy as np

from ssmamba_models.data.bags import Bags
from ssmamba_models.engine.mil_config import MilConfig


@dataclass(frozen=True)
class MilFold:
    """One training: places of the slides to learn from, to stop by and to test on; each sorted."""

    train: np.ndarray
    val: np.ndarray
    test: np.ndarray


def make_folds(bags: Bags, config: MilConfig) -> list[MilFold]:
    """Divide the slides.

    Where the labels have splits: one fold, "train" and "test", and "val" where there is one. Else cross-validation:
    each slide is tested once. Validation slides are held out of the training slides; both divisions are by patient and
    stratified by class.

    Raises:
        ValueError: a class has fewer patients than there are folds, or a split is missing or lacks a class.
        ImportError: scikit-learn is missing.
    """
    splits = [bag.split for bag in bags.bags]
    if any(split is not None for split in splits):
        return [_from_splits(bags, np.array(splits), config)]
    everything = np.arange(len(bags))
    _check_patients(bags, everything, config.folds, f"too few for {config.folds} folds; use fewer --folds")
    parts = _divide(bags, everything, config.folds, config.seed)
    return [_hold_out(bags, np.setdiff1d(everything, test), test, config) for test in parts]


def _from_splits(bags: Bags, splits: np.ndarray, config: MilConfig) -> MilFold:
    train, val, test = (np.flatnonzero(splits == name) for name in ("train", "val", "test"))
    for name, part in (("train", train), ("test", test), ("val", val)):
        lacking = set(bags.classes) - {bags.bags[place].label for place in part}
        if lacking and (name != "val" or len(part)):
            raise ValueError(
                f"the split {name!r} of the labels has no slide of class {min(lacking)!r}; every class needs slides in "
                "train and test, and in val where there is one"
            )
    return MilFold(train, val, test) if len(val) else _hold_out(bags, train, test, config)


def _hold_out(bags: Bags, train: np.ndarray, test: np.ndarray, config: MilConfig) -> MilFold:
    fewest = _check_patients(bags, train, 2, "too few to hold one out for early stopping; add slides of other patients")
    parts = min(fewest, max(2, round(1 / config.val_fraction)))
    for val in _divide(bags, train, parts, config.seed):
        left = np.setdiff1d(train, val)
        # A patient with slides of several classes may take all that there is of one.
        if len(val) and len(set(bags.targets[left])) == len(bags.classes):
            return MilFold(left, val, test)
    raise ValueError(
        "no patient can be held out for early stopping without leaving a class without slides to learn from; add "
        "slides of other patients, or name the splits in the labels' column 'split'"
    )


def _check_patients(bags: Bags, places: np.ndarray, least: int, otherwise: str) -> int:
    """The number of patients of the class that has the fewest."""
    patients_of: dict[str, set[str]] = {name: set() for name in bags.classes}
    for place in places:
        patients_of[bags.bags[place].label].add(bags.bags[place].patient)
    rarest = min(patients_of, key=lambda name: len(patients_of[name]))
    if len(patients_of[rarest]) < least:
        raise ValueError(f"class {rarest!r} has slides of {len(patients_of[rarest])} patients to divide, {otherwise}")
    return len(patients_of[rarest])


def _divide(bags: Bags, places: np.ndarray, parts: int, seed: int) -> list[np.ndarray]:
    """The places in so many parts, by patient; patients are stratified by class, for they are what is drawn."""
    try:
        from sklearn.model_selection import StratifiedKFold
    except ImportError as error:
        raise ImportError(f'folds need scikit-learn ({error}); pip install "ssmamba-models[mil]"') from error
    class_of = _patient_classes(bags, places)
    names = sorted(class_of)
    splitter = StratifiedKFold(parts, shuffle=True, random_state=seed % 2**32)
    with warnings.catch_warnings():
        # A patient with slides of several classes counts for one of them here.
        warnings.filterwarnings("ignore", message="The least populated class", category=UserWarning)
        drawn = [{names[k] for k in part} for _, part in splitter.split(names, [class_of[name] for name in names])]
    return [np.array([place for place in places if bags.bags[place].patient in part], dtype=int) for part in drawn]


def _patient_classes(bags: Bags, places: np.ndarray) -> dict[str, str]:
    """Each patient's class; of those with slides of several, the one that fewest patients have."""
    classes_of = defaultdict(set)
    for place in places:
        classes_of[bags.bags[place].patient].add(bags.bags[place].label)
    frequency = Counter(label for labels in classes_of.values() for label in labels)
    return {patient: min(labels, key=lambda label: (frequency[label], label)) for patient, labels in classes_of.items()}
