"""Celery is bent in one package, as its table says, and what was read for it has not changed."""

from __future__ import annotations

import ast
import re
import textwrap
from importlib import import_module
from pathlib import Path

import pytest

from celery_sharding.celery_hooks.installer import read_digest
from celery_sharding.celery_hooks.table import HOOKS, Hook, Stage

PACKAGE = Path(__file__).resolve().parents[2] / "celery_sharding"

# What other rooms still reach for, and why.
LEFT = {
    "brokers": dict.fromkeys(
        ["_engines", "_get", "_lookup", "_new_queue", "_open", "_purge", "_put", "_size"],
        "what a virtual channel of kombu implements; in the table",
    ),
    "dedup": {
        "_get_current_object": "the documented way through a proxy",
        "_meta": "Django's, and documented",
        "_cache": "of a cache of Django's",
        "_create_client": "a client as the result backend makes it; in the table",
        "setattr": "an attribute of ours, on the app and on functions",
    },
    "flower": dict.fromkeys(["args", "exchange", "kwargs", "routing_key"], "of a task of Flower's"),
    "rabbitmq": {"confirms": "an attribute of ours, on a channel"},
    "testing": {"_replace": "of a named tuple"},
    "worker": {
        "_raw": "a body of the embedded broker as it was published; in the table",
        "accept": "what a task's message may hold, set as Celery's consumer sets it",
    },
}
LIBRARIES = {"amqp", "billiard", "celery", "kombu", "vine"}


ALL = [hook for hooks in HOOKS.values() for hook in hooks]


@pytest.mark.parametrize("hook", ALL, ids=[hook.target for hook in ALL])
def test_what_was_read_for_a_hook_has_not_changed(hook: Hook) -> None:
    # Given the source that is installed, when it is compared with what was read
    found = read_digest(hook)
    # Then it is the same; else somebody must read it again
    assert found == hook.digest, (
        f"{hook.target}, or one of {hook.reads}, is not what was read of {hook.read_in}. Read it again for {hook.by} "
        f"({hook.why}), and then write the new version and digest={found!r} into celery_hooks/table.py"
    )


def test_every_hook_says_what_installs_it_and_no_target_is_bent_twice() -> None:
    assert list(HOOKS) == list(Stage)
    for stage, hooks in HOOKS.items():
        for hook in hooks:
            module, _, name = hook.by.partition(":")
            assert bool(name) is (stage is not Stage.CALLED)
            if name:
                assert callable(getattr(import_module(f"celery_sharding.celery_hooks.{module}"), name))
    assert len({hook.target for hook in ALL}) == len(ALL)


def test_no_other_module_reaches_into_celery_or_its_libraries() -> None:
    found = set()
    for path in PACKAGE.rglob("*.py"):
        room = path.relative_to(PACKAGE).parts[0]
        if room != "celery_hooks":
            found |= {(room, name) for name in find_reaches(ast.parse(path.read_text()))}
    left = {(room, name) for room, names in LEFT.items() for name in names}
    assert found - left == set(), "this belongs into `celery_hooks`"
    assert left - found == set(), "this is gone, and is to be taken off the list"


def test_what_bends_the_client_of_the_broker_stands_below_all_that_uses_it() -> None:
    for name in ("client", "foreign"):
        source = (PACKAGE / "celery_hooks" / f"{name}.py").read_text()
        assert set(re.findall(r"^from (celery_sharding\S*)", source, re.MULTILINE)) <= {"celery_sharding.wire"}


def test_a_reach_into_celery_is_found_however_it_is_written() -> None:
    # Given the ways in which Celery can be bent
    ways = """
    from celery._state import _task_stack
    def bend(consumer, channel, task, thing):
        thing._confirm_selected
        super()._open()
        def inner(): ...
        thing.anything = inner
        thing.other = partial(inner)
        consumer.amqheartbeat = 3
        consumer.app.conf.setting = True
        object.__setattr__(thing, "a", 1)
        setattr(thing, name, 1)
    """
    # Then each is found, and what is ours is not
    tree = ast.parse(textwrap.dedent(ways))
    assert find_reaches(tree) == {
        "_task_stack", "_confirm_selected", "_open", "anything", "other", "amqheartbeat", "setting", "setattr",
    }  # fmt: skip
    ours = "class A:\n  def b(self, x):\n    self._c = lambda: 1\n    x._c = 2\n    x.entry = 3\n    x.b()"
    assert find_reaches(ast.parse(ours)) == set()


# What objects of Celery and its libraries are called in our code.
CELERYS = {
    "_consumer",
    "app",
    "c",
    "conf",
    "consumer",
    "pool",
    "task",
    "connection",
    "channel",
    "message",
    "hub",
    "transport",
}


def find_reaches(tree: ast.Module) -> set[str]:
    """Return the names that a module reaches for or replaces on objects that are not its own."""
    nodes = list(ast.walk(tree))
    functions = {node.name for node in nodes if isinstance(node, ast.FunctionDef)}
    own = functions | {node.attr for node in nodes if isinstance(node, ast.Attribute) and is_self(node.value)}
    own |= {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    found = set()
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in LIBRARIES:
            found |= {alias.name for alias in node.names if is_private(alias.name)}
        elif isinstance(node, ast.Attribute) and is_private(node.attr) and not is_self(node.value):
            is_super = isinstance(node.value, ast.Call) and ast.unparse(node.value) == "super()"
            if is_super or node.attr not in own:
                found.add(node.attr)
        elif isinstance(node, ast.Call) and is_setattr(node.func):
            found.add("setattr")
        elif isinstance(node, ast.Assign):
            for target in node.targets:
                if isinstance(target, ast.Attribute) and not is_self(target.value):
                    is_function = isinstance(node.value, ast.Lambda) or (
                        ast.unparse(node.value).removeprefix("partial(").partition(",")[0].rstrip(")") in functions
                    )
                    owner = ast.unparse(target.value).rpartition(".")[2]
                    if is_function or (owner in CELERYS and not target.attr.startswith("shard")):
                        found.add(target.attr)
    return found


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def is_setattr(node: ast.expr) -> bool:
    """Say whether it is `setattr` or `object.__setattr__`; text of every call would take seconds to make."""
    if isinstance(node, ast.Attribute):
        return node.attr == "__setattr__" and isinstance(node.value, ast.Name) and node.value.id == "object"
    return isinstance(node, ast.Name) and node.id == "setattr"


def is_self(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id in ("self", "cls")
