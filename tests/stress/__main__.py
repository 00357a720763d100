"""Eight processes on fifty keys of each claim store for a minute: python -m stress [--seconds 60] [URL …]

URL is a result backend; without one: the Redis of SHARDING_TEST_REDIS_URL, an SQLite file, and a private PostgreSQL and
Memcached. Exits with 1 if any key had two holders, or two commits within its time to live; the logs are kept then.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

from celery_sharding.testing import ServerMissing, ServerNotReady
from stress.run import stress


def open_stores(servers: ExitStack, root: Path) -> list[str]:
    """Start what is not there, and return the result backends."""
    from support.store_servers import Memcached, Postgres

    return [
        os.environ["SHARDING_TEST_REDIS_URL"],
        f"db+sqlite:///{root}/claims.sqlite",
        f"db+{servers.enter_context(Postgres()).url}",
        servers.enter_context(Memcached()).url,
    ]


def main() -> int:
    parser = argparse.ArgumentParser(prog="make stress", description=__doc__)
    parser.add_argument("urls", metavar="URL", nargs="*")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--processes", type=int, default=8)
    parser.add_argument("--keys", type=int, default=50)
    options = parser.parse_args()
    root = Path(tempfile.mkdtemp(prefix="stress-"))
    failed = False
    with ExitStack() as servers:
        urls = options.urls or open_stores(servers, root)
        for number, url in enumerate(urls):
            folder = root / str(number)
            folder.mkdir()
            counts, violations = stress(
                url, folder, seconds=options.seconds, processes=options.processes, keys=options.keys
            )
            told = ", ".join(f"{what} {count}" for what, count in sorted(counts.items()))
            sys.stdout.write(f"{url.partition('://')[0]}: {len(violations)} violations; {told}\n")
            for violation in violations[:20]:
                sys.stdout.write(f"  {violation}\n")
            if not counts["claim"]:
                sys.stdout.write(f"  nothing was claimed within {options.seconds:g} s: give it more, SECONDS=60\n")
            failed = failed or bool(violations) or not counts["claim"]
    if failed:
        sys.stdout.write(f"logs are in {root}\n")
        return 1
    shutil.rmtree(root)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ServerMissing, ServerNotReady) as error:
        sys.exit(str(error))
