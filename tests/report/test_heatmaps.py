"""Where targets stand in the table of layers and modules."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.models import MODELS, build

from adapterkit.report.heatmaps import Grid

PARTS = st.sampled_from(["a", "block", "0", "1", "12", "q", "layers", "²"])
PATHS = st.lists(st.lists(PARTS, min_size=1, max_size=5).map(".".join), unique=True, max_size=30)


@given(paths=PATHS)
def test_no_two_paths_share_a_place_and_a_place_says_its_path(paths: list[str]) -> None:
    grid = Grid.of(paths)
    assert len(set(grid.places.values())) == len(paths)
    for path, (row, column) in grid.places.items():
        assert ".".join(filter(None, (row, column))) == path
        assert grid.rows.count(row) == grid.columns.count(column) == 1


@given(paths=PATHS)
def test_labels_are_as_different_as_the_rows(paths: list[str]) -> None:
    grid = Grid.of(paths)
    assert len({grid.label(row) for row in grid.rows}) == len(grid.rows)
    assert all(grid.common + grid.label(row) == row for row in grid.rows)


@pytest.mark.parametrize(
    ("paths", "rows", "columns"),
    [
        # a plain stack; files list layer 10 before layer 2
        (
            ["m.layers.10.q", "m.layers.2.q", "m.layers.2.up", "m.layers.10.up"],
            ["m.layers.2", "m.layers.10"],
            ["q", "up"],
        ),
        # T5: the second number is a place inside a block
        (
            [f"block.{i}.layer.{j}.{n}" for i in range(3) for j, n in ((0, "q"), (0, "v"), (1, "wi"))],
            ["block.0", "block.1", "block.2"],
            ["layer.0.q", "layer.0.v", "layer.1.wi"],
        ),
        # Swin: stages of different depths
        (
            [f"stage.{i}.blocks.{j}.{n}" for i, depth in enumerate((1, 3)) for j in range(depth) for n in "qv"],
            ["stage.0.blocks.0", "stage.1.blocks.0", "stage.1.blocks.1", "stage.1.blocks.2"],
            ["q", "v"],
        ),
        # no numbers: every layer is a row
        (["conv1d", "fc", "deep.conv"], ["conv1d", "fc", "deep.conv"], [""]),
        # a number at the end is a name, not a layer number
        (["features.0", "features.3"], ["features.0", "features.3"], [""]),
        ([], [], []),
    ],
)
def test_known_models(paths: list[str], rows: list[str], columns: list[str]) -> None:
    grid = Grid.of(paths)
    assert list(grid.rows) == rows
    assert list(grid.columns) == columns


def test_a_label_keeps_the_name_of_the_stack() -> None:
    assert Grid.of(["model.layers.0.q", "model.layers.1.q"]).label("model.layers.1") == "layers.1"
    assert Grid.of(["0.q", "1.q"]).label("1") == "1"


@pytest.mark.parametrize("name", MODELS)
def test_every_tiny_model_has_a_grid(name: str) -> None:
    paths = [path for path, module in build(name).named_modules() if path and not list(module.children())]
    grid = Grid.of(paths)
    assert set(grid.places) == set(paths)
