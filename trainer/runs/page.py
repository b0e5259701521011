"""One page that compares runs: curves, and a table to sort. It loads nothing, so it works without a network."""

import html
import io
from collections.abc import Sequence
from pathlib import Path

from trainer.errors import UserError, counted
from trainer.runs.folder import Run
from trainer.runs.table import COLUMNS, cells, differences, sweeps

_LINES = 20  # of a plot, before their names and colors run out
_HEAD = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>%s</title><style>
body { font: 14px/1.4 system-ui, sans-serif; margin: 2em; color: #222 }
table { border-collapse: collapse; margin-top: 1em } th, td { padding: .3em .8em; border-bottom: 1px solid #ddd }
th { cursor: pointer; text-align: left; white-space: nowrap } td.number { text-align: right; white-space: nowrap }
.running { color: #0a7 } .failed, .killed { color: #c22 } .stopped { color: #b70 }
svg { max-width: 100%%; height: auto }
</style></head><body>
"""
_SORT = """<script>
document.querySelectorAll("th").forEach((head, column) => head.addEventListener("click", () => {
  const body = document.querySelector("tbody"), up = head.dataset.up = head.dataset.up === "1" ? "0" : "1";
  const key = row => row.cells[column].dataset.value;
  const order = (a, b) => isNaN(key(a)) || isNaN(key(b)) ? key(a).localeCompare(key(b)) : key(a) - key(b);
  [...body.rows].sort((a, b) => up === "1" ? order(a, b) : order(b, a)).forEach(row => body.append(row));
}));
</script></body></html>
"""


def page(runs: Sequence[Run], folder: Path, now: float) -> str:
    """The HTML. Raises UserError without matplotlib."""
    title = html.escape(f"{counted(len(runs), 'run')} below {folder.absolute()}")
    body = [_HEAD % title, f"<h1>{title}</h1>", _curves(runs, folder)]
    body += [f"<p>{html.escape(sentence)}</p>" for sentence in sweeps(runs, folder)]
    body += ["<table><thead><tr>", *(f"<th>{name}</th>" for name in COLUMNS), "</tr></thead><tbody>"]
    for run, options in zip(runs, differences(runs), strict=True):
        values = [None, None, None, None, *_numbers(run), None, now - run.written, None]
        texts = [*cells(run, folder, now), options]
        body.append("<tr>" + "".join(map(_cell, texts, values, COLUMNS)) + "</tr>")
    return "\n".join([*body, "</tbody></table>", _SORT])


def _numbers(run: Run) -> list[float | None]:
    names = ("rows", "steps", "rows_per_second", "elbo", "elbo_per_row", "held_out_elbo_per_row")
    return [run.metrics.get(name) for name in names]


def _cell(text: str, value: float | None, column: str) -> str:
    style = text if column == "status" else "number" if value is not None else ""
    key = html.escape(text if value is None else repr(float(value)), quote=True)
    return f'<td class="{style}" data-value="{key}">{html.escape(text)}</td>'


def _curves(runs: Sequence[Run], folder: Path) -> str:
    """ELBO per row against steps and against seconds, as SVG; of many runs the best and those that run."""
    try:
        from matplotlib import colormaps
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError("html= needs the package matplotlib: pip install matplotlib.") from error
    drawn = [run for run in runs if run.curve]
    drawn.sort(key=lambda run: -float(run.curve[-1]["elbo_per_row"]))
    colors = colormaps["tab20"]
    figure = Figure(figsize=(12, 4.5), layout="constrained")
    FigureCanvasSVG(figure)
    for axes, across in zip(figure.subplots(1, 2, sharey=True), ("step", "seconds")):
        axes.set_prop_cycle(color=[colors(number) for number in range(_LINES)])
        for run in drawn[:_LINES]:
            x, y = ([float(row[name]) for row in run.curve] for name in (across, "elbo_per_row"))
            axes.plot(x, y, linewidth=1.2, label=str(run.folder.relative_to(folder)))
        axes.set_xlabel(across)
        ends = sorted(float(row["elbo_per_row"]) for run in drawn[:_LINES] for row in run.curve)
        if len(ends) > 20:  # the first steps would flatten the rest
            axes.set_ylim(bottom=ends[len(ends) // 20])
    figure.axes[0].set_ylabel("ELBO per row, by chunk")
    if drawn:
        figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside right upper", fontsize="small")
    out = io.StringIO()
    figure.savefig(out, format="svg", metadata={"Date": None})
    text = out.getvalue()
    more = f"<p>The {_LINES} highest of {len(drawn)} curves.</p>" if len(drawn) > _LINES else ""
    return text[text.index("<svg") :] + more
