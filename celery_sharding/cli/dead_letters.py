"""`celery -A app shards dead-letters …`: look at dead letters, replay them, discard them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence

import click

from celery_sharding.cli.exits import Unhealthy, WrongUsage, ask, check_can_ask, yes_option
from celery_sharding.cli.groups import find_on_rabbitmq, operator_name, resolve_group, resolve_groups
from celery_sharding.cli.output import align, emit, format_time, json_option
from celery_sharding.errors import LockHeld, TopologyError
from celery_sharding.extension import Sharding
from celery_sharding.operations.dead_letters import LETTERS_MAX, Listing, discard, read_dead, replay
from celery_sharding.operations.letters import DeadLetter, letter_to_json
from celery_sharding.texts import printable

_VERB = "dead-letters"
_REASON_LENGTH = 80
_PROGRESS_STEP = 1_000
_HEADINGS = ("ID", "DEAD SINCE", "TASK", "TASK ID", "KEY", "ATTEMPTS", "REASON")
_WARNING = """They run behind everything that waits now, out of the order of their keys: later tasks have run already.
What they did before they died, they may do again; only tasks under @deduplicate do nothing twice."""


@click.group("dead-letters")
def dead_letters() -> None:
    """Show dead letters, replay them, discard them.

    A message becomes a dead letter when it cannot run: its process died too often, it was rejected, it cannot be
    decoded, or its task failed in a group with on_failure="dead-letter". It stays until it is replayed or discarded.
    """


@dead_letters.command("list")
@click.argument("group", required=False)
@click.option(
    "--limit", type=click.IntRange(1, LETTERS_MAX), default=20, show_default=True, help="Show at most this many."
)
@json_option
@click.pass_context
def list_letters(ctx: click.Context, group: str | None, limit: int, as_json: bool) -> None:
    """List the dead letters of GROUP, or of all groups, in the order of the queue. They stay where they are.

    \b
    Examples:
      celery -A shop shards dead-letters list
      celery -A shop shards dead-letters list orders --limit 100
      celery -A shop shards dead-letters list orders --json | jq '.groups[].letters[] | .task'
    """
    listings: dict[str, Listing] = {}
    sharding = find_on_rabbitmq(ctx, _VERB)
    names = resolve_groups(sharding, group)
    for name in names:
        try:
            listings[name] = read_dead(sharding.connect, name, limit=limit)
        except LockHeld:
            raise
        except TopologyError as exc:
            if group is not None:
                raise
            click.echo(str(exc), err=True)
    if as_json:
        emit(ctx, {"schema": 1, "groups": [_to_json(name, found) for name, found in listings.items()]})
    else:
        for name, found in listings.items():
            emit(ctx, _describe_listing(name, found))
    if len(listings) < len(names):
        ctx.exit(Unhealthy.exit_code)


@dead_letters.command()
@click.argument("group")
@click.argument("letter_id", metavar="ID")
@click.option("--body", is_flag=True, help="Show its arguments as well; they may be secret.")
@json_option
@click.pass_context
def show(ctx: click.Context, group: str, letter_id: str, body: bool, as_json: bool) -> None:
    """Show everything in the dead letter ID of GROUP.

    The body is decoded, unless that could run code in it, as with a pickle.

    \b
    Examples:
      celery -A shop shards dead-letters show orders 3f0c9a41d2
      celery -A shop shards dead-letters show orders 3f0c9a41d2 --body --json
    """
    sharding = find_on_rabbitmq(ctx, _VERB)
    name = resolve_group(sharding, group)
    found = read_dead(sharding.connect, name, limit=LETTERS_MAX)
    (letter,) = _pick(name, found, (letter_id,))
    shown = letter_to_json(letter, details=True, body=body)
    if as_json:
        emit(ctx, shown)
        return
    headers, properties = shown.pop("headers"), shown.pop("properties")
    lines = [f"{name:<16}{'-' if value is None else _one_line(value)}" for name, value in shown.items()]
    for title, values in (("headers", headers), ("properties", properties)):
        lines += [title, *(f"  {name:<24}{_one_line(value)}" for name, value in sorted(values.items()))]
    emit(ctx, [line.rstrip() for line in lines])


@dead_letters.command("replay")
@click.argument("group")
@click.argument("ids", nargs=-1, metavar="[ID]…")
@click.option("--all", "every", is_flag=True, help="All letters with a key.")
@click.option("--reason", help="With --all: only those whose REASON in `list` contains this.")
@yes_option
@click.pass_context
def replay_letters(
    ctx: click.Context, group: str, ids: tuple[str, ...], every: bool, reason: str | None, yes: bool
) -> None:
    """Publish dead letters to GROUP again, under their keys, and remove them from the dead-letter queue.

    They run behind everything that waits now: later tasks of their keys have run already. Among themselves they keep
    their order. Each keeps its task id, starts with no attempts and no retries counted, and no longer expires.

    If this command is killed, the letter that it just replayed may still be there; replayed again, it runs twice,
    unless its task is under @deduplicate. None is lost.

    \b
    Examples:
      celery -A shop shards dead-letters replay orders 3f0c9a41d2 77b01c5e90
      celery -A shop shards dead-letters replay orders --all
      celery -A shop shards dead-letters replay orders --all --reason "is not registered" --yes
    """
    sharding = find_on_rabbitmq(ctx, _VERB)
    chosen_group = sharding.settings.group(group, needed_by="the command line")
    letters = _choose(sharding, group, ids, every=every, reason=reason, yes=yes)
    keyless = [letter for letter in letters if not letter.key]
    if keyless and not every:
        raise Unhealthy(
            f"{', '.join(letter.id for letter in keyless)}: without a shard key, since no worker wrote it; nothing "
            "was done"
        )
    if keyless:
        click.echo(f"{len(keyless)} letters have no shard key and stay", err=True)
        letters = [letter for letter in letters if letter.key]
    if not letters:
        click.echo(f"{group}: no dead letters to replay", err=True)
        return
    click.echo(_WARNING, err=True)
    _ask(f"Replay {len(letters)} dead letters of {group}?", letters, yes=yes)
    done = replay(
        sharding.connect,
        chosen_group,
        {letter.id for letter in letters},
        by=operator_name(),
        progress=_Progress() if len(letters) > _PROGRESS_STEP else None,
    )
    ctx.obj.echo(f"{group}: {len(done)} replayed")


@dead_letters.command("discard")
@click.argument("group")
@click.argument("ids", nargs=-1, metavar="[ID]…")
@click.option("--all", "every", is_flag=True, help="All letters.")
@click.option("--reason", help="With --all: only those whose REASON in `list` contains this.")
@yes_option
@click.pass_context
def discard_letters(
    ctx: click.Context, group: str, ids: tuple[str, ...], every: bool, reason: str | None, yes: bool
) -> None:
    """Delete dead letters of GROUP for good. The history of the group records which, and who did it.

    \b
    Examples:
      celery -A shop shards dead-letters discard orders 3f0c9a41d2
      celery -A shop shards dead-letters discard orders --all --reason expired
    """
    sharding = find_on_rabbitmq(ctx, _VERB)
    name = resolve_group(sharding, group)
    letters = _choose(sharding, name, ids, every=every, reason=reason, yes=yes)
    if not letters:
        click.echo(f"{name}: no dead letters to discard", err=True)
        return
    _ask(f"Delete {len(letters)} dead letters of {name}?", letters, yes=yes)
    done = discard(sharding.connect, name, {letter.id for letter in letters}, by=operator_name())
    ctx.obj.echo(f"{name}: {len(done)} discarded")


def _choose(
    sharding: Sharding, group: str, ids: Sequence[str], *, every: bool, reason: str | None, yes: bool
) -> list[DeadLetter]:
    """Return the chosen letters, as they are now, without those that arrive while the operator is asked."""
    if bool(ids) == every or (reason is not None and not every):
        raise WrongUsage("name dead letters by their ID, or use --all, with or without --reason")
    check_can_ask(yes=yes)
    found = read_dead(sharding.connect, group, limit=LETTERS_MAX)
    if not every:
        return _pick(group, found, ids)
    if found.more:
        click.echo(f"{found.more} letters are beyond the first {LETTERS_MAX}; repeat this for them", err=True)
    return [letter for letter in found.letters if reason is None or reason in letter.why]


def _pick(group: str, found: Listing, ids: Sequence[str]) -> list[DeadLetter]:
    by_id = {letter.id: letter for letter in found.letters}
    missing = [each for each in ids if each not in by_id]
    if missing:
        raise Unhealthy(
            f"no such dead letter in {group}: {', '.join(missing)}; it may have been replayed or discarded meanwhile"
        )
    return [by_id[each] for each in dict.fromkeys(ids)]


def _ask(question: str, letters: Sequence[DeadLetter], *, yes: bool) -> None:
    if not yes:
        for (task, reason), count in Counter((each.task, each.reason) for each in letters).most_common(10):
            click.echo(f"  {count:>6}  {printable(task or '-')}: {_shorten(reason)}", err=True)
    ask(question, yes=yes)


class _Progress:
    """Prints on stderr how far a replay is, now and then."""

    def __init__(self) -> None:
        self._shown = 0

    def note(self, done: int, of: int) -> None:
        if done - self._shown >= _PROGRESS_STEP or done == of:
            self._shown = done
            click.echo(f"{done} of {of} replayed", err=True)


def _describe_listing(name: str, found: Listing) -> list[str]:
    count = len(found.letters) + found.more
    lines = [f"{name}: {count} dead letters" if count else f"{name}: no dead letters"]
    rows = [
        (
            letter.id,
            format_time(letter.dead_at),
            letter.task or "-",
            letter.task_id or "-",
            letter.key or "-",
            str(letter.attempts),
            _shorten(letter.why),
        )
        for letter in found.letters
    ]
    if rows:
        lines += [f"  {line}" for line in align(_HEADINGS, rows, numeric={5})]
    if found.more:
        lines.append(f"  and {found.more} more; --limit shows more of them")
    return lines


def _to_json(name: str, found: Listing) -> dict[str, object]:
    return {"name": name, "letters": [letter_to_json(letter) for letter in found.letters], "more": found.more}


def _one_line(value: object) -> str:
    return value if isinstance(value, str) and value.isprintable() else json.dumps(value)


def _shorten(text: str) -> str:
    text = " ".join(printable(text).split())
    return text if len(text) <= _REASON_LENGTH else f"{text[: _REASON_LENGTH - 1]}…"
