"""How account names are folded."""

from __future__ import annotations

from triosspi.security.names import AccountName, simple_upper


def test_upper_casing_keeps_what_has_no_upper_case_of_one_letter() -> None:
    assert simple_upper("straße \u0149 ü") == "STRAßE \u0149 Ü"


def test_upper_casing_makes_no_ascii_letter_of_another_one() -> None:
    # A dotless i and a long s: "adm\u0131n" is not "admin".
    assert simple_upper("adm\u0131n \u017f") == "ADM\u0131N \u017f"


def test_a_name_that_other_code_upper_cases_is_folded_as_ours() -> None:
    assert AccountName("straße").upper() == "STRAßE"
    assert f"{AccountName('straße')}" == "straße"
