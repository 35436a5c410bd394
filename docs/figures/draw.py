"""Draw the pictures of README and of the site's start from measured tables: python docs/figures/draw.py"""

from __future__ import annotations

import csv
import re
import sys
from pathlib import Path

import matplotlib as mpl

mpl.use("svg")
import matplotlib.pyplot as plt

from kvcomp.stages.registry import find

sys.path.insert(0, str(Path(__file__).parent))
from tables import fidelity

ROOT = Path(__file__).resolve().parents[2]
ACCURACY = ROOT / "benchmarks" / "figures" / "ruler_2048.csv"  # kvcomp bench, docs/results.md
SPEED = ROOT / "docs" / "figures" / "attention_speed.csv"  # kvcomp speed --attention, docs/results.md
CONTEXT = "32000"
DIVERGENCE = {  # by model, as far as they are there: kvcomp bench --tasks fidelity, docs/results.md
    "SmolLM2-135M": ROOT / "benchmarks" / "figures" / "fidelity_smollm2.csv",
    "Qwen2.5-Coder-1.5B": ROOT / "benchmarks" / "figures" / "fidelity_qwen.csv",
}
NAMED = {  # points of the picture of divergence whose names are written, and where
    ("SmolLM2-135M", "none"): (0, -14, "center"),
    ("SmolLM2-135M", "int(bits=4, basis=hadamard)"): (0, 22, "center"),
    ("SmolLM2-135M", "klt(bits=2)"): (-7, -3, "right"),
    ("SmolLM2-135M", "kivi(bits=2)"): (8, -3, "left"),
    ("SmolLM2-135M", "kvzip(keep=0.5)"): (8, 0, "left"),
    ("SmolLM2-135M", "int(bits=4) + sketch(keep=0.1)"): (8, -4, "left"),
    ("SmolLM2-135M", "kivi(bits=4) + quest(keep=0.25)"): (8, -4, "left"),
    ("Qwen2.5-Coder-1.5B", "none"): (9, -3, "left"),
    ("Qwen2.5-Coder-1.5B", "int(bits=2, basis=hadamard)"): (-8, -45, "left"),
}
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
FAMILIES = {"quantizer": GOOD, "policy": BAD, "policy + quantizer": "#ad5b00", "selector": "#5e35b1"}
MARKS = ("o", "s")


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


def family(stack: str) -> str:
    """A stack's families: those of its stages, windows and `none` left out where there is another."""
    names = re.findall(r"(?:^|\+ )(\w+)", stack)
    found = {find(name).family for name in names if name != "none"} - {"window"}
    if "selector" in found:
        return "selector"
    return " + ".join(name for name in ("policy", "quantizer") if name in found) or "quantizer"


def divergence(axes: plt.Axes) -> None:
    """1 - TVD over the bits that are held for each element, a point a stack."""
    shown: dict[str, str] = {}
    for mark, (model, path) in zip(MARKS, DIVERGENCE.items(), strict=True):
        if not path.is_file():
            continue
        for row in fidelity(path.name):
            kind = family(row["stack"])
            shown[kind] = FAMILIES[kind]
            x = float(row["effective_bits"])
            y, low, high = (100 * float(row[f"overlap{end}"]) for end in ("", "_low", "_high"))
            low = low if y < 100 else y  # the uncompressed cache itself
            axes.errorbar(
                x, y, [[y - low], [high - y]], fmt=mark, color=FAMILIES[kind], capsize=2, linewidth=1, markersize=4
            )
            if (model, row["stack"]) in NAMED:
                right, up, side = NAMED[model, row["stack"]]
                axes.annotate(row["stack"], (x, y), (right, up), textcoords="offset points", ha=side)
        axes.plot([], [], mark, color=GREY, label=model)
    for kind, colour in shown.items():
        axes.plot([], [], "o", color=colour, label=kind)
    axes.legend(loc="lower right", frameon=False)
    axes.set_xscale("log", base=2)
    axes.set_xticks([2, 4, 8, 16, 32], ["2", "4", "8", "16", "32"])
    axes.set_yticks([85, 90, 95, 100])
    axes.minorticks_off()
    axes.set(xlim=(1.75, 44), ylim=(81, 101.5), xlabel="bits held for each element of K and V, everything included")
    axes.set_title("Next tokens: 1 - TVD in %, 95 % intervals", fontsize=10, loc="left")


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
    """Write headline_accuracy.svg, headline_divergence.svg and headline_speed.svg to a folder."""
    paths = []
    for name, panel in (("accuracy", accuracy), ("divergence", divergence), ("speed", speed)):
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
