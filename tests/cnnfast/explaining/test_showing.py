"""What explain prints, writes and draws."""

from __future__ import annotations

import json
import re
import sys

import pytest
import torch
from rich.console import Console

import cnnfast
from cnnfast import explaining
from cnnfast.explaining.picturing import COLORS
from tests.support.explained import Net, image


@pytest.fixture(scope="module")
def explanation() -> explaining.Explanation:
    with torch.device("meta"):
        model = Net().bfloat16()
    return cnnfast.explain(model, image(), gpu="a100", train=True)


def test_the_json_has_every_operation_and_adds_up(explanation):
    data = json.loads(explanation.to_json())
    assert data.keys() == {
        *("note", "model", "gpu", "arch", "mode", "dtype", "inputs"),
        *("rows", "totals", "bytes", "launches", "pytorch", "blocks", "training"),
    }
    assert "model's figures" in data["note"]
    assert (data["gpu"], data["arch"], data["mode"]) == ("NVIDIA A100-SXM4-80GB", 80, "train")
    assert data["inputs"] == [[4, 8, 12, 12]]
    wanted = {"layer", "operation", "kernel", "tile", "registers", "residents", "limiter", "modelled_us", "roofline_us"}
    assert all(
        row.keys() >= wanted | {"exact", "intensity", "bytes", "served", "launches", "flops"} for row in data["rows"]
    )
    assert [row["layer"] for row in data["rows"]] == [row.layer for row in explanation.rows]
    assert list(data["totals"]) == ["fprop", "dgrad", "wgrad", "bias", "norm", "pool"]
    for operation, total in data["totals"].items():
        rows = [row for row in data["rows"] if row["operation"] == operation]
        for name in ("modelled_us", "roofline_us"):
            assert total[name] == pytest.approx(sum(row[name] for row in rows), rel=1e-12)
    assert data["bytes"] == sum(row["bytes"] for row in data["rows"])
    assert data["launches"] == sum(row["launches"] for row in data["rows"])


def printed(explanation, width: int) -> list[str]:
    console = Console(width=width, color_system=None, force_terminal=False, legacy_windows=False)
    with console.capture() as captured:
        console.print(explanation)
    return captured.get().splitlines()


def test_equal_operations_share_a_line_and_what_takes_longest_comes_first(explanation):
    lines = str(explanation).splitlines()
    assert sum("body.0.conv x2" in line for line in lines) == 3  # its three operations
    assert not any("body.1.conv" in line for line in lines[: lines.index("") if "" in lines else None])
    (fprop,) = [line.split() for line in lines if line.startswith("body.0.conv x2") and " fprop " in line]
    rows = [row for row in explanation.rows if row.operation == "fprop" and row.layer.startswith("body")]
    assert float(fprop[-5]) == pytest.approx(sum(row.modelled_us for row in rows), rel=0.06)
    table = lines[next(i for i, line in enumerate(lines) if line.startswith("───")) + 1 :]
    found = [re.search(r" (?:tensor|issue|l2|shared|memory|latency) +([\d.,]+)", line) for line in table]
    times = [float(match[1].replace(",", "")) for match in found if match]
    assert times == sorted(times, reverse=True)
    assert sum(times) == pytest.approx(sum(row.modelled_us for row in explanation.rows), rel=0.05)
    (totals,) = [line for line in lines if line.startswith("our kernels")]
    assert totals.split()[2] == str(len(explanation.rows))
    assert "nothing here was measured" in lines[0]
    text = " ".join(str(explanation).split())
    assert f"Kernels launched in a step: {explanation.launches}, which" in text
    assert "2 mm" in text
    assert "layer by layer: cnnfast info MODEL --training." in text
    assert text.endswith("The loss and the optimizer are not counted.")


@pytest.mark.parametrize("width", [60, 80, 100, 120, 160])
def test_a_narrow_window_leaves_columns_out_and_cuts_nothing(explanation, width):
    lines = printed(explanation, width)
    assert max(map(len, lines)) <= width
    line = next(line for line in lines if line.startswith("depthwise"))
    row = next(row for row in explanation.rows if row.layer == "depthwise")
    assert "depthwise" in line.split()[2] or "gradient" in line
    assert (f"{row.launches and row.served}" in line) == (width >= 100)
    heading = "\n".join(lines[:6])
    assert ("MB" in heading) == (width >= 120)


def test_a_bar_a_layer_in_the_colour_of_its_limiter(explanation, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    from matplotlib.colors import to_hex
    from matplotlib.figure import Figure

    drawn = []
    savefig = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **how: (drawn.append(self), savefig(self, *args, **how)))
    explanation.picture(tmp_path / "net.png")
    explanation.picture(str(tmp_path / "net.svg"))
    assert (tmp_path / "net.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (tmp_path / "net.svg").read_text()
    figure, _ = drawn
    assert "nothing here was measured" in figure.get_suptitle()
    for axes, (operation, total) in zip(figure.axes, explanation.totals.items(), strict=True):
        rows = [row for row in explanation.rows if row.operation == operation]
        assert axes.get_title().startswith(f"{operation}: ")
        assert sum(bar.get_width() for bar in axes.patches) == pytest.approx(total.modelled_us)
        assert sum(line.get_xdata()[0] for line in axes.lines) == pytest.approx(total.roofline_us)
        names = [label.get_text() for label in axes.get_yticklabels()]
        forward = dict.fromkeys(row.layer for row in explanation.rows)
        assert names == [layer for layer in forward if layer in {row.layer for row in rows}]
        colors = {to_hex(bar.get_facecolor()) for bar in axes.patches if bar.get_width()}
        assert colors == {COLORS[row.limiter] for row in rows if row.modelled_us}
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend[-1] == "roofline"
    assert set(legend[:-1]) == {row.limiter for row in explanation.rows}


def test_a_picture_of_no_known_kind(explanation, tmp_path):
    pytest.importorskip("matplotlib")
    with pytest.raises(ValueError, match="'nothing' is not supported"):
        explanation.picture(tmp_path / "net.nothing")


def test_a_picture_needs_matplotlib(explanation, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "cnnfast.explaining.picturing", raising=False)
    monkeypatch.delattr(explaining, "picturing", raising=False)
    for name in [name for name in sys.modules if name.startswith("matplotlib.")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ImportError, match="a picture needs matplotlib, which is not installed: pip install"):
        explanation.picture(tmp_path / "net.png")
