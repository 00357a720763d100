"""What this worker knows of the layout of one group, as it tails the manifest."""

from __future__ import annotations

import enum
import logging

from celery_sharding.layout.model import Layout
from celery_sharding.layout.retention import Reading
from celery_sharding.rabbitmq.streams import Event, decode
from celery_sharding.topology import Names

logger = logging.getLogger(__name__)


class Heard(enum.Enum):
    """What a record of the manifest changes for its reader."""

    NOTHING = "nothing"
    CHANGED = "changed"
    MISSED = "missed"


class ManifestReader:
    """Folds the records that follow a layout which was read before.

    Attributes:
        layout: The newest layout known.
    """

    def __init__(self, names: Names) -> None:
        self.layout = Layout()
        self._names = names
        self._reading = Reading()

    @property
    def is_behind(self) -> bool:
        """Whether the layout may be an old one, because records are gone that were not read."""
        return self._reading.misses is not None

    @property
    def is_snapshot_due(self) -> bool:
        return self._reading.is_snapshot_due

    def begin(self, layout: Layout) -> None:
        """Go on from a layout that was just read."""
        self.layout = layout
        self._reading = Reading(layout)

    def note(self, body: bytes, offset: int) -> Heard:
        """Take the next record. `MISSED`, told once: records before it are gone, and the layout is to be read anew."""
        was_behind, before = self.is_behind, self.layout
        self._reading.note(offset, decode(body, stream=self._names.manifest, offset=offset))
        if not self.is_behind:
            self.layout = self._reading.layout
            return Heard.NOTHING if self.layout == before else Heard.CHANGED
        if was_behind:
            return Heard.NOTHING
        logger.warning("group %s: records of its manifest are gone before they were read", self._names.group)
        return Heard.MISSED

    def make_snapshot(self, *, by: str) -> Event:
        return self._reading.make_snapshot(by=by)
