"""Images, audio and video in conversations are refused by name; the texts beside them are read."""

import pytest
from kit import sft_jax, write_jsonl

from sft_jax.data.read.formats import parse
from sft_jax.data.read.rows import RowError

pytestmark = pytest.mark.smoke

ANSWER = {"role": "assistant", "content": "bread"}
TEXT = {"type": "text", "text": "What is this?"}


@pytest.mark.parametrize(
    ("part", "named"),
    [
        ({"type": "image"}, "a part of type 'image'"),
        ({"type": "image_url", "image_url": {"url": "a.png"}}, "a part of type 'image_url'"),
        ({"type": "input_audio", "input_audio": {}}, "a part of type 'input_audio'"),
        ({"type": "video", "video": "a.mp4"}, "a part of type 'video'"),
        ({"image": "a.png"}, "a part with 'image'"),
        (TEXT | {"audio": "a.wav"}, "a part with 'audio'"),
    ],
)
def test_parts_of_a_content(part, named):
    messages = [{"role": "user", "content": [TEXT, part]}, ANSWER]
    with pytest.raises(RowError, match=rf"message 0: 'content' has {named}; only text .*data.on_bad_row: skip"):
        parse("messages", {"messages": messages})


@pytest.mark.parametrize("name", ["image", "images", "videos", "audio"])
def test_columns_and_keys_of_messages(name):
    question = {"role": "user", "content": [TEXT]}
    for row in ({"messages": [question, ANSWER], name: ["a"]}, {"messages": [question | {name: ["a"]}, ANSWER]}):
        with pytest.raises(RowError, match=rf"has '{name}'; only text is supported.*ignore_columns: \[{name}\]"):
            parse("messages", row)
        assert parse("messages", row, ignored=(name,)).messages[0]["content"] == TEXT["text"]


def test_texts_of_several_parts():
    row = {
        "messages": [{"role": "user", "content": [TEXT, "Look", {"type": "text", "text": "!", "image": None}]}, ANSWER]
    }
    assert parse("messages", row).messages[0]["content"] == "What is this?Look!"


def test_the_row_and_a_way_out(tiny, tmp_path):
    """``inspect`` names file and row, and does what the message says."""
    good = {"messages": [{"role": "user", "content": [TEXT]}, ANSWER]}
    bad = {"messages": [{"role": "user", "content": [{"type": "image", "url": "a.png"}, TEXT]}, ANSWER]}
    data = write_jsonl(tmp_path / "a.jsonl", [good, bad])
    config = tmp_path / "config.yaml"
    config.write_text(f"model: {{path: {tiny}}}\ndata: {{train: [{{path: {data}}}]}}\ntraining: {{output_dir: x}}\n")
    done = sft_jax("inspect", config)
    assert done.returncode == 2
    assert "a.jsonl row 1: message 0: 'content' has a part of type 'image'" in done.stderr
    done = sft_jax("inspect", config, "data.on_bad_row=skip")
    assert (done.returncode, "What is this?" in done.stdout) == (0, True)
