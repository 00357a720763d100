"""Drive the RabbitMQ node that another process made in a folder: `python -m celery_sharding.testing restart FOLDER`."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from celery_sharding.testing.processes import ServerMissing, ServerNotReady
from celery_sharding.testing.rabbit_node import RabbitNode


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m celery_sharding.testing", description=__doc__)
    parser.add_argument("verb", choices=("start", "stop", "kill", "restart", "ctl"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="for ctl: the arguments of rabbitmqctl")
    given = parser.parse_args(argv)
    try:
        node = RabbitNode.open(given.folder)
        if given.verb == "ctl":
            sys.stdout.write(node.ctl(*given.arguments))
        else:
            getattr(node, given.verb)()
    except (ServerMissing, ServerNotReady, FileNotFoundError) as error:
        sys.stderr.write(f"{error}\n")
        return 1
    except subprocess.CalledProcessError as error:
        return error.returncode
    return 0


if __name__ == "__main__":
    sys.exit(main())
