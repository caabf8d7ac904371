"""Studies that the quality gate refused at their import are not learned from without a word."""

from pathlib import Path

import pytest

from pe_app.cli.options import fit_studies
from pe_app.common.errors import InputError
from pe_app.studies import Study, write_studies


def test_unfit_studies_are_left_out_and_named(tmp_path, capsys):
    fit = Study("a", tmp_path / "a", fitness="warned", reasons="weak_contrast")
    unfit = Study("b", tmp_path / "b", fitness="refused", reasons="no_contrast")
    write_studies([fit, unfit, Study("c", tmp_path / "c")], tmp_path / "studies.csv")
    assert [study.study for study in fit_studies(tmp_path / "studies.csv")] == ["a", "c"]
    assert "1 of 3 studies are unfit and left out: b (no_contrast)" in capsys.readouterr().err
    write_studies([unfit], tmp_path / "studies.csv")
    with pytest.raises(InputError, match="none of its 1 studies is fit"):
        fit_studies(tmp_path / "studies.csv")


def test_a_list_without_an_import_is_taken_whole_and_in_silence(tmp_path, capsys):
    write_studies([Study("a", Path(tmp_path / "a"))], tmp_path / "studies.csv")
    assert len(fit_studies(tmp_path / "studies.csv")) == 1
    assert capsys.readouterr().err == ""
