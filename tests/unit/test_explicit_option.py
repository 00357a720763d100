"""Telling what the application set on a task from what Celery filled in.

This rests on the order in which Celery builds and binds a task's class. If one of these tests fails after an update of
Celery, `routing.explicit_option` has to be read anew: otherwise acks_late=False would pass, and tasks be lost.
"""

from __future__ import annotations

import pytest
from celery import Celery, Task

from celery_sharding.publish.router import explicit_option


class Early(Task):
    acks_late = False
    priority = 3


class Silent(Task):
    pass


@pytest.fixture(params=[True, False, None])
def app(request: pytest.FixtureRequest) -> Celery:
    app = Celery("explicit", set_as_current=False)
    if request.param is not None:
        app.conf.update(task_acks_late=request.param, task_default_priority=5)
    return app


def make(app: Celery, **options: object) -> Task:
    def task() -> None:
        pass

    made = app.task(shared=False, name=f"task-{len(app._tasks)}", **options)(task)
    app.finalize()
    return app.tasks[made.name]


@pytest.mark.parametrize("value", [True, False])
def test_an_option_of_the_decorator_is_explicit(app: Celery, value: bool) -> None:
    assert explicit_option(make(app, acks_late=value), "acks_late") is value


def test_an_option_of_a_base_class_is_explicit(app: Celery) -> None:
    assert explicit_option(make(app, base=Early), "acks_late") is False
    assert explicit_option(make(app, base=Early), "priority") == 3


def test_an_option_of_a_class_based_task_is_explicit(app: Celery) -> None:
    class Own(Early):
        name = "own"

    assert explicit_option(app.register_task(Own()), "acks_late") is False


def test_a_default_of_the_configuration_or_of_celery_is_not(app: Celery) -> None:
    for task in (make(app), make(app, base=Silent)):
        assert explicit_option(task, "acks_late") is None
        assert explicit_option(task, "priority") is None


def test_the_base_of_a_task_may_itself_be_a_task_that_was_bound_before(app: Celery) -> None:
    first = make(app, acks_late=False)
    assert explicit_option(make(app, base=type(first)), "acks_late") is False
    assert explicit_option(make(app, base=type(make(app))), "acks_late") is None
