"""Serve a trained model with OpenAI's completions and chat API: for trying models and for evaluation.

mythos serve RUN_DIR                        # http://127.0.0.1:8000/v1
mythos serve RUN_DIR --port 0               # a free port, which is printed

One process, one model. No replacement for a production server: docs/serving.md says what vLLM would need.
"""

import argparse
import importlib.util

from mythos_dist.config.arguments import WEIGHTS_HELP, add_tokenizer_option, integer, location, number, parse_arguments
from mythos_dist.errors import UserError, run_command

PACKAGES = ("fastapi", "uvicorn", "prometheus_client")


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("run_dir", type=location, help=WEIGHTS_HELP)
    add("--host", default="127.0.0.1", help="address to listen on; beyond loopback, set --api-key-file (%(default)s)")
    add("--port", type=integer(0, 65535), default=8000, help="0: a free one, which is printed (%(default)s)")
    add("--api-key-file", help="a file with the key that clients send; mode 0600; default: no authentication")
    add("--model-name", help="the name that requests use; default: that of the folder")
    add("--n-loops", type=integer(1, 512), help="loops of requests without `loops`; default: as in training")
    add("--max-batch", type=integer(1, 1024), default=16, help="sequences generated at once (%(default)s)")
    add("--max-sequences", type=integer(1, 1 << 20), default=256, help="more get status 429 (%(default)s)")
    add("--max-body-mib", type=integer(1, 1024), default=4, help="largest request, in MiB (%(default)s)")
    add("--cache", default="all", help="keys and values kept: all, last or every:K loops (%(default)s)")
    add("--template", help="for chat: a Jinja file, or plain; default: the template of the training shards")
    add_tokenizer_option(parser)
    add("--shutdown-seconds", type=number(0, 3600), default=30, help="wait for requests at the end (%(default)s)")
    return parser


def main() -> None:
    """Load the model and serve it until SIGTERM or Ctrl-C."""
    arguments = parse_arguments(build_parser())
    if missing := [name for name in PACKAGES if importlib.util.find_spec(name) is None]:
        raise UserError(f"the server needs {', '.join(missing)}; pip install 'mythos_dist[serve]'")

    from mythos_dist.serve.command import run  # imports torch

    run(arguments)


if __name__ == "__main__":
    run_command(main)
