"""Runs lm-evaluation-harness with models of this library.

    python -m sft_jax.evaluation.harness --model sft-jax --model_args path=RUN_OR_FOLDER --tasks arc_easy

takes the arguments of ``lm_eval``, for which it registers a model (:mod:`sft_jax.evaluation.harness_model`).
"""

from __future__ import annotations

import sys

from sft_jax.errors import UserError, exit_code
from sft_jax.without_tpus import leave_out_tpus


def main() -> int:
    """Register the model, and run the command line of lm-evaluation-harness."""
    leave_out_tpus()
    try:
        import lm_eval.__main__ as harness  # type: ignore[import-not-found]

        import sft_jax.evaluation.harness_model  # noqa: F401
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "lm_eval":
            raise
        print("sft-jax: lm_eval: the package is not installed (pip install 'sft-jax[lm-eval]')", file=sys.stderr)
        return 2
    try:
        harness.cli_evaluate()
    except UserError as error:
        print(f"sft-jax: {error}", file=sys.stderr)
        return exit_code(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
