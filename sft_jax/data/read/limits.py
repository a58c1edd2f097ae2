"""Limits of data files, so that no file takes all memory, all disk or all time. ``configs/README.md`` lists them."""

from __future__ import annotations

ROW_BYTES = 1 << 25  # of one row in its file
ROW_VALUES = 1 << 23  # numbers, texts and nulls of one row of a Parquet or Arrow file
TEXT_BYTES = 5 << 19  # of one text to tokenize, a document or a rendered conversation; may need 1 GB of memory
BATCH_BYTES = 1 << 21  # of the rows that are tokenized at a time
JSON_OBJECT_BYTES = 1 << 28  # of a .json file that is an object; a list of rows may have any size
EXPANSION_BYTES = 1 << 30  # that a compressed file may always have after decompression
EXPANSION = 100  # beyond these bytes: how many times its size
ARROW_ROWS = 100_000  # that a Parquet or Arrow file may always have; beyond: EXPANSION for each of its bytes
ARROW_BYTES = 1 << 30  # memory for reading a Parquet or Arrow file, beyond its size
ARROW_SECONDS = 10  # processor time for a part of such a file, beyond one second for each 10 MB of the file
