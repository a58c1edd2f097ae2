"""Token mixers with a state of constant size: convolutions and linear recurrences, in chunked parallel form."""
