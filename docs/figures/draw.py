"""Draw the pictures of README and of the site's start from measured tables: python docs/figures/draw.py"""

from __future__ import annotations

import csv
import re
import sys
from pathlib import Path

import matplotlib as mpl

mpl.use("svg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).resolve().parents[2]
ACCURACY = ROOT / "benchmarks" / "figures" / "ruler_2048.csv"  # kvcomp bench, docs/results.md
SPEED = ROOT / "docs" / "figures" / "attention_speed.csv"  # kvcomp speed --attention, docs/results.md
CONTEXT = "32000"
SHOWN = {  # stacks of the left panel, and where their names are written: points to the right, and up
    "kivi(bits=4)": (0, 21, "center"),
    "int(bits=4, basis=hadamard)": (-4, 25, "left"),
    "turboquant(bits=3)": (-9, -3, "right"),
    "kivi(bits=2)": (9, -3, "left"),
    "snapkv(keep=0.25, kernel=31) + kivi(bits=4)": (0, -56, "center"),
}
BARS = (
    "sdpa",
    "none",
    "kivi(bits=4)",
    "turboquant(bits=4)",
    "int(bits=4)",
    "kivi(bits=4) + sketch(keep=0.1)",
    "kivi(bits=4) + quest(keep=0.1)",
)
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "kvcomp",
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
}
GOOD, BAD, GREY = "#00695c", "#c62828", "#616161"


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def accuracy(axes: plt.Axes) -> None:
    """Points off the uncompressed accuracy over how many times smaller the cache is, with 95 % intervals."""
    axes.axhline(0, color=GREY, linewidth=1, linestyle="--")
    axes.text(10.35, 0.6, "uncompressed", color=GREY, ha="right", va="bottom")
    for row in rows(ACCURACY):
        if row["stack"] not in SHOWN:
            continue
        x = float(row["held_ratio"])
        change, low, high = (100 * float(row[name]) for name in ("change", "change_low", "change_high"))
        colour = GOOD if high >= 0 else BAD
        axes.errorbar(x, change, [[change - low], [high - change]], fmt="o", color=colour, capsize=3, linewidth=1.5)
        right, up, side = SHOWN[row["stack"]]
        axes.annotate(
            row["stack"].replace(" + ", "\n+ "), (x, change), (right, up), textcoords="offset points", ha=side
        )
    axes.set(xlim=(3.2, 10.4), ylim=(-42, 14), xlabel="times smaller than the uncompressed float32 cache")
    axes.set_title("RULER: points lost or gained, 95 % intervals", fontsize=10, loc="left")


def speed(axes: plt.Axes) -> None:
    """Time of a layer's attention at 32,000 tokens on two CPU threads."""
    found = {row["stack"]: row for row in rows(SPEED) if row["context"] == CONTEXT}
    ms = {name: float(row["ms"]) for name, row in found.items()}
    names = BARS[::-1]
    bars = axes.barh(names, [ms[name] for name in names], color=[GREY if n == "sdpa" else GOOD for n in names])
    ratios = {name: float(row["times_as_fast"]) for name, row in found.items()}
    axes.bar_label(bars, [f"{ms[name]:.2f} ms, {ratios[name]:.1f}x" for name in names], padding=3)
    axes.set(xlim=(0, 7.4), xlabel="milliseconds for a step's attention in one layer")
    axes.tick_params(axis="y", length=0)
    axes.set_title("Attention over 32,000 tokens, two CPU threads", fontsize=10, loc="right")


def draw(folder: Path) -> list[Path]:
    """Write headline_accuracy.svg and headline_speed.svg to a folder."""
    paths = []
    for name, panel in (("accuracy", accuracy), ("speed", speed)):
        with mpl.rc_context(STYLE):
            figure, axes = plt.subplots(figsize=(5.2, 3.7), layout="constrained")
            panel(axes)
            path = folder / f"headline_{name}.svg"
            figure.savefig(path, format="svg", metadata={"Date": None}, facecolor="white")
            plt.close(figure)
        text = path.read_text(encoding="utf-8").replace("'DejaVu Sans'", "'DejaVu Sans', Verdana, Arial, sans-serif")
        path.write_text(re.sub(r" +$", "", text, flags=re.MULTILINE), encoding="utf-8")
        paths.append(path)
    return paths


if __name__ == "__main__":
    draw(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
