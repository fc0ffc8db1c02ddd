"""The simulated engine's flags: vLLM's that matter to a queue, and `--sim-…` ones of its own."""

import argparse
from collections.abc import Sequence
from typing import NoReturn

from core.errors import UsageError


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"simulated engine: {message}")


def parse(flags: Sequence[str]) -> argparse.Namespace:
    """The options of a command line. Raises UsageError for what is not among them."""
    parser = _Parser(prog="simulated engine", add_help=False, allow_abbrev=False)
    parser.add_argument("--served-model-name")
    parser.add_argument("--max-model-len", type=int, default=8192)
    parser.add_argument("--max-num-seqs", type=int, default=256)
    parser.add_argument("--max-loras", type=int, default=8)
    parser.add_argument("--max-cpu-loras", type=int)
    parser.add_argument("--max-lora-rank", type=int, default=16)
    parser.add_argument("--sim-step-ms", type=float, default=1.0, help="time of one token")
    parser.add_argument("--sim-step-ms-per-seq", type=float, default=0.0, help="more a sequence")
    parser.add_argument("--sim-load-ms", type=float, default=0.0, help="pause for a load")
    parser.add_argument("--sim-fold-factor", type=float, default=0.75, help="of a folded step")
    parser.add_argument("--sim-fold-ms", type=float, default=0.0, help="pause for a fold")
    parser.add_argument("--sim-fold-fails", type=int, help="an adapter whose fold kills the engine")
    parser.add_argument("--sim-cache-tokens", type=int, default=0, help="what the KV cache holds")
    parser.add_argument("--sim-die-on", help="die when a body or a probed adapter holds this text")
    parser.add_argument("--sim-noop", action="store_true", help="one word, at once: for benchmarks")
    return parser.parse_args(list(flags))
