"""Benchmarks beside the peers: `python -m benchmarks [NAME ...]`; each module here with `cases` answers one question.

A module says what is compared (`runner.Case`), `runner` measures it, `results` keeps it as JSON, and `table`, `page`
and `plot` show it: in the terminal, in `docs/performance.md` and as the picture there.
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
    "growth",
)
