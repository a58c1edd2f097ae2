"""``sft-jax watch``."""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any

from sft_jax.commands.shared import quiet_imports
from sft_jax.errors import UserError


def add(commands: Any) -> None:
    """Add the command's options."""
    parser = commands.add_parser("watch", help="watch a run in a browser of this machine while it trains")
    parser.add_argument("run", metavar="RUN", help="the run directory (training.output_dir), or gs://…")
    parser.add_argument("--port", type=int, default=6007, metavar="N", help="default 6007; 0: any free port")
    parser.set_defaults(command=run)


def run(options: argparse.Namespace) -> int:
    """Serve the page until Ctrl-C."""
    os.environ["JAX_PLATFORMS"] = "cpu"  # leaves the accelerators to training
    quiet_imports()
    from sft_jax.run.watch import watch

    try:
        server = watch(options.run, options.port)
    except OSError as error:
        raise UserError(f"--port: {options.port}: {error.strerror or error}; name another, or 0 for any") from error
    host, port = server.server_address[:2]
    where = f"http://{host if isinstance(host, str) else host.decode()}:{port}/"
    print(f"watching {options.run} at {where}; Ctrl-C ends it", file=sys.stderr, flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        return 0
    finally:
        server.server_close()
    return 0
