"""A report appears whole or not at all, and nothing that was there is lost."""

import os

import pytest

from ssmamba_models.evaluation.report_folder import check_report_folder, whole_report


def write_report(folder, text="new", plots=("a.png",)):
    with whole_report(folder) as part:
        for name in plots:
            (part / "plots" / name).write_text(text)
        (part / "report.md").write_text(text)
        (part / "report.json").write_text(text)


def contents(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_files_take_their_places(tmp_path):
    write_report(tmp_path)
    assert contents(tmp_path) == ["plots/a.png", "report.json", "report.md"]


def test_an_error_leaves_the_old_report_as_it_was(tmp_path):
    write_report(tmp_path, "old")

    def fail_midway():
        with whole_report(tmp_path) as part:
            (part / "report.json").write_text("new")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail_midway()
    assert contents(tmp_path) == ["plots/a.png", "report.json", "report.md"]
    assert (tmp_path / "report.json").read_text() == "old"


def test_pictures_of_the_old_report_go(tmp_path):
    write_report(tmp_path, "old", plots=("a.png", "b.png"))
    write_report(tmp_path, "new", plots=("b.png", "c.png"))
    assert contents(tmp_path) == ["plots/b.png", "plots/c.png", "report.json", "report.md"]
    assert (tmp_path / "plots" / "b.png").read_text() == "new"


def test_an_existing_report_needs_overwrite(tmp_path):
    write_report(tmp_path)
    with pytest.raises(FileExistsError, match="holds a report; replace it with --overwrite"):
        check_report_folder(tmp_path)
    assert check_report_folder(tmp_path, overwrite=True) == tmp_path


def test_features_of_an_interrupted_run_are_taken_up(tmp_path):
    (tmp_path / "features").mkdir()
    assert check_report_folder(tmp_path) == tmp_path


def test_a_folder_of_other_things_is_refused_even_with_overwrite(tmp_path):
    (tmp_path / "thesis.doc").touch()
    with pytest.raises(FileExistsError, match=r"holds other things \('thesis.doc'\)"):
        check_report_folder(tmp_path, overwrite=True)


def test_places_that_cannot_be(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match="is a file; name a folder"):
        check_report_folder(tmp_path / "file")
    with pytest.raises(FileNotFoundError, match="mkdir -p"):
        check_report_folder(tmp_path / "no" / "report")
    assert os.listdir(tmp_path) == ["file"]
