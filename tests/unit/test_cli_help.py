"""The examples in the help of every verb."""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Iterator

import click
import pytest

from celery_sharding.cli import shards


def verbs(group: click.Group = shards, path: tuple[str, ...] = ()) -> Iterator[tuple[str, click.Command]]:
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from verbs(command, (*path, name))
        else:
            yield " ".join((*path, name)), command


VERBS = dict(verbs())


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_examples_that_it_takes_as_they_stand(verb: str) -> None:
    command = VERBS[verb]
    examples = [line.strip() for line in str(command.help).splitlines() if line.strip().startswith("celery -A")]

    assert examples
    for example in examples:
        line = example.partition(" | ")[0].partition(" > ")[0]
        assert line.startswith(f"celery -A shop shards {verb}")
        command.make_context(verb, shlex.split(line.removeprefix(f"celery -A shop shards {verb}")))


def test_other_commands_of_celery_import_no_verb() -> None:
    # Every `celery` command loads the group, the start of a worker included
    script = "import sys, celery_sharding.cli; print(*(name for name in sys.modules if '_sharding.cli.' in name))"
    loaded = subprocess.run([sys.executable, "-c", script], check=True, text=True, stdout=subprocess.PIPE).stdout
    assert loaded.split() == ["celery_sharding.cli.exits", "celery_sharding.cli.forgotten"]
