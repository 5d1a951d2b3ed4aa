"""strongswan.conf and swanctl.conf, read as strongSwan reads them."""

from __future__ import annotations

from pathlib import Path

import pytest

from bridge.charon.conf_parser import Settings


def settings(folder: Path, text: str) -> Settings:
    path = folder / "main.conf"
    path.write_text(text)
    return Settings(path)


def test_options_are_found_by_their_dotted_path(tmp_path: Path) -> None:
    found = settings(tmp_path, "charon {\n  threads = 16\n  plugins { ha { monitor = no } }\n}\n")
    assert found.get("charon.threads") == "16"
    assert found.get("charon.plugins.ha.monitor") == "no"
    assert found.get("charon.plugins.ha.resync") is None
    assert found.get("elsewhere.threads") is None


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("a { b = plain words # a comment\n }", "plain words"),
        ('a { b = "quoted # { } \\"text\\"" }', 'quoted # { } "text"'),
        ("a { b = x }", "x"),
        ("a { b=x\n }", "x"),
        ("a\n{\nb = x\n}", "x"),
        ("a { b = aes128gcm16-x25519,aes128-sha256 }", "aes128gcm16-x25519,aes128-sha256"),
        ("a { b = %any, fd00::1 }", "%any, fd00::1"),
        ("a { b = }", ""),
        ("# a { b = no }\na { b = x }", "x"),
    ],
)
def test_a_value_ends_with_its_line_a_comment_or_a_brace(tmp_path: Path, text: str, value: str) -> None:
    assert settings(tmp_path, text).get("a.b") == value


def test_a_section_that_is_opened_again_is_added_to_and_the_last_value_counts(tmp_path: Path) -> None:
    found = settings(tmp_path, "a { b = 1\n c = 1 }\na { b = 2 }\n")
    assert (found.get("a.b"), found.get("a.c")) == ("2", "1")


def test_a_section_takes_from_others_what_it_does_not_set(tmp_path: Path) -> None:
    text = "c { one { v = 1\n children { net { p = x } } }\n two : c.one { v = 2 }\n three : c.two, c.none { } }"
    found = settings(tmp_path, text)
    assert (found.get("c.two.v"), found.get("c.three.v")) == ("2", "2")
    assert found.get("c.three.children.net.p") == "x"
    assert found.names("c.three.children") == ["net"]


def test_sections_that_refer_to_each_other_end(tmp_path: Path) -> None:
    assert settings(tmp_path, "a : b { }\nb : a { }\n").get("a.x") is None


def test_an_included_file_counts_where_it_is_included(tmp_path: Path) -> None:
    (tmp_path / "conf.d").mkdir()
    (tmp_path / "conf.d/1.conf").write_text("ha { monitor = yes }\n")
    (tmp_path / "conf.d/2.conf").write_text("ha { monitor = no }\n")
    found = settings(tmp_path, "charon { plugins { include conf.d/*.conf } }\ninclude /nowhere/*.conf\n")
    assert found.get("charon.plugins.ha.monitor") == "no"
    assert [path.name for path in found.files] == ["main.conf", "1.conf", "2.conf"]


def test_files_that_include_each_other_end(tmp_path: Path) -> None:
    assert settings(tmp_path, "include main.conf\na { b = 1 }\n").get("a.b") == "1"


def test_a_file_that_is_not_there_is_as_if_it_were_empty(tmp_path: Path) -> None:
    assert Settings(tmp_path / "none").get("a.b") is None
