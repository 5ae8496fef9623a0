"""Where targets stand in the table of layers and modules."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapterkit.report.heatmaps import Cell, layer_map, number, percent, places_of, shade

PARTS = st.sampled_from(["a", "block", "0", "1", "12", "q", "layers", "²"])
PATHS = st.lists(st.lists(PARTS, min_size=1, max_size=5).map(".".join), unique=True, max_size=30)


@given(paths=PATHS)
def test_no_two_paths_share_a_place_and_a_place_says_the_end_of_its_path(paths: list[str]) -> None:
    places = places_of(paths)
    assert sorted(places) == sorted(paths)
    assert len(set(places.values())) == len(paths)
    common = {path.removesuffix(".".join(filter(None, place))) for path, place in places.items()}
    assert len(common) <= 1


@pytest.mark.parametrize(
    ("paths", "rows", "columns"),
    [
        # a plain stack; files list layer 10 before layer 2, and the name of the stack stays
        (
            ["m.layers.10.q", "m.layers.2.q", "m.layers.2.up", "m.layers.10.up"],
            ["layers.2", "layers.10"],
            ["q", "up"],
        ),
        (["0.q", "1.q"], ["0", "1"], ["q"]),
        # Swin: stages of different depths
        (
            [f"stage.{i}.blocks.{j}.{n}" for i, depth in enumerate((1, 3)) for j in range(depth) for n in "qv"],
            ["stage.0.blocks.0", "stage.1.blocks.0", "stage.1.blocks.1", "stage.1.blocks.2"],
            ["q", "v"],
        ),
        # T5: two stacks in the order of the model
        (
            [f"{s}.block.{i}.layer.{j}.q" for s in ("encoder", "decoder") for i in range(2) for j in range(2)],
            [f"{s}.block.{i}.layer.{j}" for s in ("encoder", "decoder") for i in range(2) for j in range(2)],
            ["q"],
        ),
        # no numbers: every layer is a row
        (["conv1d", "fc", "deep.conv"], ["conv1d", "fc", "deep.conv"], ["itself"]),
        (["up.0.attn.to_out.0", "up.1.attn.to_out.0"], ["up.0", "up.1"], ["attn.to_out.0"]),
        # a number at the end is a name, not a layer number
        (["features.0", "features.3"], ["features.0", "features.3"], ["itself"]),
        ([], [], []),
    ],
)
def test_known_models(paths: list[str], rows: list[str], columns: list[str]) -> None:
    found = layer_map("title", places_of(paths), {path: Cell(path) for path in paths})
    assert [label for label, _ in found.rows] == rows
    assert list(found.columns) == columns
    assert sorted(cell.text for _, cells in found.rows for cell in cells if cell.text) == sorted(paths)


def test_numbers_and_shades() -> None:
    assert [number(x) for x in (0.004, -0.256, 1.0)] == ["0", "−0.26", "1.00"]
    assert [percent(x) for x in (0.0, 0.00001, 0.0123, 0.5, 1.0)] == ["0", "<0.01", "1.2", "50", "100"]
    assert [shade(x, 2.0) for x in (0.0, 1.0, 2.0, 9.0)] == ["h0", "h4", "h9", "h9"]
    assert [shade(x, 1.0, signed=True) for x in (-1.0, 0.01, 0.5)] == ["n9", "h0", "p4"]
    assert shade(1.0, 0.0) == "h0"
