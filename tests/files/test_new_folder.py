"""The output folder of an export."""

import pytest

from sft_jax.errors import UserError
from sft_jax.files.new_folder import new_folder

pytestmark = pytest.mark.smoke


def write(out, text, meanwhile=lambda: None):
    with new_folder(str(out)) as folder:
        (folder / "config.json").write_text(text)
        meanwhile()


def names(folder):
    return sorted(one.name for one in folder.iterdir())


def test_of_two_exports_into_one_folder_one_wins(tmp_path):
    out = tmp_path / "out"

    def second():
        with pytest.raises(UserError, match=r"out: is being written by process \d+ on .*, since .*; wait for it"):
            write(out, "second")

    write(out, "first", meanwhile=second)
    assert (out / "config.json").read_text() == "first"
    assert names(tmp_path) == ["out"]
    with pytest.raises(UserError, match="out: exists and is not an empty folder"):
        write(out, "third")
    assert names(tmp_path) == ["out"]


def test_a_folder_that_appears_meanwhile_is_kept(tmp_path):
    out = tmp_path / "out"

    def meanwhile():
        out.mkdir()
        (out / "config.json").write_text("theirs")

    with pytest.raises(UserError, match="out: another process wrote it meanwhile; use another folder"):
        write(out, "ours", meanwhile)
    assert (out / "config.json").read_text() == "theirs"
    assert names(tmp_path) == ["out"]


def test_what_killed_exports_left_is_removed(tmp_path):
    (tmp_path / ".out.partial-a").mkdir()
    (tmp_path / ".out.partial-a" / "model.safetensors").write_text("half")
    (tmp_path / ".out.lock").write_text("{}")
    (tmp_path / ".other.partial-b").mkdir()
    write(tmp_path / "out", "whole")
    assert names(tmp_path) == [".other.partial-b", "out"]


def test_a_folder_that_cannot_be_created_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file.*: cannot be written: .*; use another folder"):
        write(tmp_path / "file" / "out", "text")
