"""The tasks that a run file can name."""

from __future__ import annotations

from dist_reg.tasks.base import EXAMPLE_ID, Task
from dist_reg.tasks.collator import Collator
from dist_reg.tasks.loading import TASKS, load_task

__all__ = ["EXAMPLE_ID", "TASKS", "Collator", "Task", "load_task"]
