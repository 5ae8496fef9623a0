"""Benchmarks against other libraries: `python -m benchmarks [NAME ...]`. Each module with `cases` answers one question.

A module says what is compared (`runner.Case`), `runner` measures it, and `results` keeps it as JSON. `table` shows it
in the terminal, `page` in `docs/performance.md`, and `plot` draws the picture there.
"""

# In the order in which they run and stand in tables.
NAMES = (
    "imports",
    "injection",
    "switch",
    "save",
    "load",
    "merge",
    "merge_on_disk",
    "combine",
    "forward",
    "per_sample",
    "training",
    "growth",
)
