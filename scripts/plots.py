"""Plots of experts, of matching losses, and of what runs and gradients reach."""

import itertools
from pathlib import Path

import numpy as np

from distill.report.matplotlib_figures import drawing
from distill.suggest import Suggestion


def save_buffer(path: Path, accuracies: dict[str, np.ndarray], distances: dict[str, np.ndarray]) -> None:
    """A PNG of how experts learned: accuracy by epoch, and relative distances between snapshots by start epoch.

    Args:
        accuracies: images → [experts, epochs 1…E] in [0, 1], NaN where unknown; may be empty.
        distances: between what → [experts, start epochs 0…]; NaN where an expert has no such snapshot.
    """
    with drawing(path, 1, 2, size=(9, 3.5)) as ((accuracy, distance),):
        for colour, (name, values) in zip(("C2", "C0"), accuracies.items()):
            _mean_and_spread(accuracy, range(1, values.shape[1] + 1), 100 * values, colour, name)
        if accuracies:
            accuracy.legend(fontsize=8)
        else:
            accuracy.text(0.5, 0.5, "not recorded", transform=accuracy.transAxes, ha="center", va="center", color="0.5")
        accuracy.set(title="accuracy of the experts, %", xlabel="epoch")
        for colour, (name, values) in zip(("C1", "C4", "C3"), distances.items()):
            _mean_and_spread(distance, range(values.shape[1]), values, colour, name)
        distance.set(title="relative distance between snapshots", xlabel="start epoch", ylim=(0, None))
        distance.legend(fontsize=8)
        for axes in (accuracy, distance):
            axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)


def save_losses(path: Path, suggested: Suggestion) -> None:
    """A PNG of the matching losses behind proposed settings, at the proposed segment length: a panel for each T, a line
    for each α."""
    losses, chosen = suggested.losses, suggested.options
    of_segment = losses.values[losses.segments.index(chosen["expert_epochs"])]
    with drawing(path, 1, len(losses.steps), size=(3.4 * len(losses.steps), 3.4), sharey=True) as (panels,):
        for axes, step, of_step in zip(panels, losses.steps, of_segment):
            for rate, of_rate in zip(losses.rates, of_step):
                proposed = (step, rate) == (chosen["syn_steps"], chosen["lr_teacher"])
                axes.plot(losses.starts, of_rate, marker=".", label=f"α = {rate:g}", linewidth=3 if proposed else 1)
            axes.axhline(1, color="0.4", linestyle="--", linewidth=1)
            axes.set(title=f"T = {step}", xlabel="start epoch", ylim=(0, 2))
            if step == chosen["syn_steps"]:
                axes.axvspan(chosen["min_start_epoch"] - 0.5, chosen["max_start_epoch"] - 0.5, color="0.9", zorder=0)
        panels[0].set_ylabel(f"matching loss of the first set, M = {chosen['expert_epochs']}")
        panels[-1].legend(fontsize=8)


OURS = [f"C{number}" for number in range(10) if number != 7]  # C7 is grey, as published results are


def save_by_images(path: Path, curves: dict[str, list[tuple[int, float, float]]], levels: dict[str, float],
                   published: dict[str, list[tuple[int, float]]], published_levels: dict[str, float]) -> None:
    """A PNG of accuracies by images per class, ours in colours and published ones in grey.

    Args:
        curves: method → points (images per class, mean, standard deviation), %; methods without points are left out.
        levels: accuracies that do not depend on the images per class: name → %.
        published, published_levels: the same for published results, without deviations.
    """
    with drawing(path, size=(8.5, 4.4)) as ((axes,),):
        drawn = [axes.errorbar(*zip(*points), marker="o", markersize=4, capsize=3, label=method, color=colour)
                 for (method, points), colour in zip(curves.items(), itertools.cycle(OURS)) if points]
        drawn += [axes.axhline(level, color="black", linestyle="--", linewidth=1, label=name)
                  for name, level in levels.items()]
        for (method, points), marker in zip(published.items(), itertools.cycle("sD^vPX")):
            drawn += axes.plot(*zip(*points), marker, color="0.6", markersize=4, linestyle=":", linewidth=1,
                               label=method)
        drawn += [axes.axhline(level, color="0.6", linestyle="--", linewidth=1, label=name)
                  for name, level in published_levels.items()]
        at = sorted({point[0] for points in (*curves.values(), *published.values()) for point in points})
        axes.set(xscale="log", xlabel="images per class", ylabel="test accuracy, %")
        axes.set_xticks(at, [str(each) for each in at])
        axes.minorticks_off()
        axes.legend(handles=drawn, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)


def save_windows(path: Path, panels: dict[str, list[tuple[str, float, float]]]) -> None:
    """A PNG of accuracy by difficulty window, a panel for each number of images.

    Args:
        panels: title → points (window in words, mean, standard deviation), %; panels without points are left out.
    """
    panels = {title: points for title, points in panels.items() if points} or panels
    with drawing(path, 1, len(panels), size=(3 * len(panels), 3.2)) as rows:
        for axes, (title, points) in zip(rows[0], panels.items()):
            for at, (_, mean, deviation) in enumerate(points):
                axes.errorbar(at, mean, deviation, marker="o", capsize=3, color="C0")
            axes.set_xticks(range(len(points)), [name for name, *_ in points])
            axes.set(title=title, xlabel="start epochs", xlim=(-0.5, max(len(points), 1) - 0.5))
        rows[0][0].set_ylabel("test accuracy, %")


def save_spent(path: Path, panels: dict[str, dict[str, list[tuple[int, float, float]]]]) -> None:
    """A PNG of accuracy by cost, a panel for each kind of cost.

    Args:
        panels: kind of cost → images per class in words → points (amount, mean, standard deviation or NaN), %; curves
            without points are left out.
    """
    labels = list(dict.fromkeys(says for curves in panels.values() for says in curves))
    with drawing(path, 1, len(panels), size=(3.2 * len(panels) + 1.5, 3.4), sharey=True) as (row,):
        lines = {}
        for axes, (what, curves) in zip(row, panels.items()):
            for says, points in curves.items():
                if points:
                    lines[says] = axes.errorbar(*zip(*points), marker="o", markersize=4, capsize=3,
                                                color=f"C{labels.index(says)}")
            axes.set(xlabel=what)
            axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
        row[0].set_ylabel("accuracy, %")
        row[0].figure.legend(lines.values(), lines, fontsize=8, loc="outside right center", frameon=False)


def save_by_steps(path: Path, panels: dict[str, dict[tuple[int, str], tuple[float, float]]]) -> None:
    """A PNG that compares gradients, a panel for each measure and a line for each gradient.

    Args:
        panels: title → (inner steps T, gradient) → mean, standard deviation.
    """
    with drawing(path, 1, len(panels), size=(3.6 * len(panels), 3.4)) as (row,):
        for axes, (title, points) in zip(row, panels.items()):
            for gradient in dict.fromkeys(gradient for _, gradient in points):
                axes.errorbar(*zip(*((steps, *points[steps, of]) for steps, of in points if of == gradient)),
                              marker=".", capsize=2, linewidth=1, label=gradient)
            axes.set(title=title, xlabel="inner steps T")
        row[0].legend(fontsize=8)


def _mean_and_spread(axes, at: range, values: np.ndarray, colour: str, label: str) -> None:
    """Draws the mean over the rows as a line, with a band of one standard deviation on each side."""
    values = np.ma.masked_invalid(values)
    mean, std = values.mean(axis=0), values.std(axis=0)
    axes.plot(at, mean, marker="." if len(at) < 30 else None, color=colour, label=label)
    axes.fill_between(at, mean - std, mean + std, alpha=0.2, color=colour, linewidth=0)
