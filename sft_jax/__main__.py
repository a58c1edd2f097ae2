"""``python -m sft_jax`` is ``sft-jax``."""

import sys

from sft_jax.cli import main

sys.exit(main())
