"""The output folder of an export."""

import pytest

from sft_jax.errors import UserError
from sft_jax.files.new_folder import new_folder

pytestmark = pytest.mark.smoke


def write(out, text, meanwhile=lambda: None):
    with new_folder(str(out)) as folder:
        (folder / "config.json").write_text(text)
        meanwhile()


def test_of_two_exports_into_one_folder_one_wins(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(UserError, match="out: another process wrote it meanwhile; use another folder"):
        write(out, "second", meanwhile=lambda: write(out, "first"))
    assert (out / "config.json").read_text() == "first"
    assert [one.name for one in tmp_path.iterdir()] == ["out"]
