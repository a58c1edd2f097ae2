"""What reads data files and configs, as functions of bytes, with seeds."""

from __future__ import annotations

import io
import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from sft_jax import config_file
from sft_jax.config import SourceConfig
from sft_jax.data.read.formats import FORMATS, parse
from sft_jax.data.read.messages import read_messages, read_template_kwargs, read_tools
from sft_jax.data.read.rows import RowError
from sft_jax.data.read.sources import open_sources
from sft_jax.errors import UserError

_CALL = {"type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
_ROWS = [
    {"messages": [{"role": "user", "content": "Tea?"}, {"role": "assistant", "content": "Yes.", "weight": 1}]},
    {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "1+1?"}]},
            {"role": "assistant", "tool_calls": [_CALL]},
        ],
        "tools": [{"type": "function", "function": {"name": "add", "parameters": {}}}],
        "chat_template_kwargs": {"enable_thinking": False},
    },
    {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "<think>b</think>c"}], "system": "s"},
    {"instruction": "Add.", "input": "1+1", "output": "2", "history": [["a", "b"]]},
    {"question": "1+1?", "answer": "2"},
    {"prompt": "a", "completion": "b"},
    {"text": "a"},
    {"input_ids": [5, 6, 2], "labels": [-100, 6, 2], "attention_mask": [1, 1, 1]},
    {"input_ids": [5, 6, 2], "assistant_masks": [0, 1, 1]},
]  # fmt: skip
_CONFIG = b"""model: {path: builtin:tiny, dtype: float32}
lora: {rank: 4, target_modules: [q_proj, v_proj]}
data: {train: [{path: a.jsonl, weight: 2.0, columns: {question: q}}], max_length: 128, template_kwargs: {a: 1}}
training: {output_dir: run, max_steps: 3, num_microbatches: auto}
evaluation: {samples: [a, b]}
"""


def _file(suffix: str) -> Callable[[bytes], None]:
    """A function that reads all rows of a file with a suffix, and parses them."""

    def read(data: bytes) -> None:
        with tempfile.TemporaryDirectory(prefix="sft-jax-fuzz-") as folder:
            path = Path(folder, f"a{suffix}")
            path.write_bytes(data)
            for source in open_sources([SourceConfig(path=str(path))]):
                list(source.read(0, min(len(source), 1000)))

    return read


def _config(data: bytes) -> None:
    with tempfile.TemporaryDirectory(prefix="sft-jax-fuzz-") as folder:
        path = Path(folder, "a.yaml")
        path.write_bytes(data)
        config_file.load(path)


def _override(data: bytes) -> None:
    config_file.from_dict(
        {"model": {"path": "a"}, "data": {"train": [{"path": "a"}]}, "training": {"output_dir": "a"}},
        data.decode(errors="replace").splitlines(),
    )


def _row(data: bytes) -> None:
    """Parse a JSON value as a row of every format; a row that cannot be used is refused as such."""
    try:
        row = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise UserError("no row") from error
    if not isinstance(row, dict):
        return
    for row_format in FORMATS:
        for keep_reasoning in (True, False):
            _ignore_row_errors(lambda f=row_format, keep=keep_reasoning: parse(f, row, keep, ["weight"]))
    for key in ("messages", "conversations"):
        _ignore_row_errors(lambda key=key: read_messages(row, key, True, set()))
    _ignore_row_errors(lambda: read_tools(row))
    _ignore_row_errors(lambda: read_template_kwargs(row))


def _ignore_row_errors(function: Callable[[], object]) -> None:
    try:
        function()
    except RowError as error:
        if "\n" in str(error):
            raise AssertionError("a reason of several lines") from error


def _parquet(**options: object) -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(_ROWS[:1] * 5), file, **options)
    return file.getvalue()


def _arrow(is_stream: bool) -> bytes:
    file, table = io.BytesIO(), pa.Table.from_pylist(_ROWS[:1] * 5)
    with (pa.ipc.new_stream if is_stream else pa.ipc.new_file)(file, table.schema) as opened:
        opened.write_table(table)
    return file.getvalue()


_LINES = [json.dumps(row).encode() for row in _ROWS]
TARGETS: dict[str, tuple[Callable[[bytes], object], list[bytes]]] = {
    "json": (_file(".json"), [json.dumps(_ROWS[:1]).encode(), *_LINES, b'{"data": [' + _LINES[0] + b"]}"]),
    "jsonl": (_file(".jsonl"), [b"\n".join(_LINES), *_LINES]),
    "csv": (_file(".csv"), [b"question,answer\n1+1?,2\n", b'text\n"a ""b""\nc"\n', b"messages\n" + b'"[{}]"\n']),
    "parquet": (_file(".parquet"), [_parquet(), _parquet(compression="none", use_dictionary=False)]),
    "arrow": (_file(".arrow"), [_arrow(True), _arrow(False)]),
    "config_yaml": (_config, [_CONFIG, b"model: &a {path: b}\ndata: {train: [*a]}\n"]),
    "override": (_override, [b"lora.rank=4", b"data.train=[{path: b}]\nlora=null", b"data.train.0.weight=2"]),
    "row": (_row, _LINES),
}
