"""What is trained and how it is judged: one file per task, chosen from `TASKS` by name."""

from core.tasks import brain_age

TASKS = {"brain_age": brain_age}
