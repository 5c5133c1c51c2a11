"""The report of a run: loss.png, and report.html, which needs no other file."""

import html
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from jaxbnb.core.extras import import_extra
from jaxbnb.core.files import atomic_write
from jaxbnb.core.units import format_bytes, format_seconds
from jaxbnb.finetune._config import TrainConfig

_BLUE, _LIGHT, _ORANGE = "#08519c", "#9ecae1", "#d95f02"
_PAGE: Final = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root {{ color-scheme: only light; }}
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto;
  padding: 0 1rem; color: #222; }}
h1 {{ font-size: 1.5rem; }}
h2 {{ font-size: 1.15rem; margin-top: 2rem; }}
svg {{ width: 100%; height: auto; }}
table {{ border-collapse: collapse; width: 100%; }}
th, td {{ text-align: left; vertical-align: top; padding: .35rem .8rem .35rem 0;
  border-bottom: 1px solid #ddd; }}
th {{ font-weight: 600; }}
td.number {{ white-space: nowrap; }}
.config {{ columns: 2; column-gap: 2rem; }}
.config div {{ display: flex; gap: .8rem; padding: .2rem 0; break-inside: avoid;
  border-bottom: 1px solid #ddd; font-size: .9rem; }}
.config dt {{ flex: 0 0 10rem; font-size: inherit; }}
.config dd {{ font-size: inherit; overflow-wrap: anywhere; }}
pre {{ background: #f4f6f8; border-radius: .4rem; padding: .6rem .8rem;
  white-space: pre-wrap; overflow-wrap: anywhere; font-size: .85rem; }}
.samples td {{ width: 33%; white-space: pre-wrap; overflow-wrap: anywhere; }}
.facts {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(11rem, 1fr));
  gap: .8rem; margin: 1rem 0; }}
.facts div {{ background: #f4f6f8; border-radius: .4rem; padding: .6rem .8rem; }}
dt {{ color: #555; font-size: .85rem; }}
dd {{ margin: 0; font-size: 1.2rem; }}
@media (max-width: 40rem) {{ .config {{ columns: 1; }} }}
</style>
</head>
<body>
<h1>{title}</h1>
<p>{subtitle}</p>
<dl class="facts">{facts}</dl>
<h2>Loss</h2>
{loss}
{samples}
<h2>Use it</h2>
<pre>{usage}</pre>
<h2>Speed and memory</h2>
{speed}
<h2>Config</h2>
<dl class="config">{config}</dl>
</body>
</html>
"""


def write_report(
    config: TrainConfig,
    out: Path,
    result: Any,
    metrics: Sequence[Mapping[str, Any]],
    data: str,
    usage: Sequence[str],
) -> None:
    """Writes loss.png and report.html.

    Args:
        config: the run's config.
        out: folder of the run.
        result: the `TrainResult`.
        metrics: lines of metrics.jsonl.
        data: description of the data.
        usage: commands that use the result.
    """
    import_extra("matplotlib", needed_by="the report", extra="finetune")
    steps = [line for line in metrics if line.get("loss") is not None]
    evaluations = [line for line in metrics if line.get("eval_loss") is not None]
    loss = _plot_loss(steps, evaluations)
    with atomic_write(out / "loss.png") as path:
        loss.savefig(path, dpi=150, format="png")
    page = _PAGE.format(
        title=html.escape(f"Fine-tuning {Path(config.model).name}"),
        subtitle=html.escape(f"{config.data or 'rows in memory'}: {data}"),
        facts=_list_facts(result),
        loss=_to_svg(loss),
        samples=_make_samples(result.samples),
        usage=html.escape("\n".join(usage)),
        speed=_to_svg(_plot_speed(steps)),
        config=_make_rows(config.to_dict()),
    )
    with atomic_write(out / "report.html") as path:
        path.write_text(page, encoding="utf-8")


def _list_facts(result: Any) -> str:
    facts = {
        "steps": f"{result.steps:,}",
        "loss of the last step": f"{result.loss:.4f}",
        "held-out loss": _format(result.eval_loss),
        "lowest held-out loss": _format(result.best_eval_loss),
        "time of the steps": format_seconds(result.seconds),
        "tokens/s": f"{result.tokens_per_second:,.0f}",
        "weights": format_bytes(result.weight_bytes),
        "trained variables": format_bytes(result.trainable_bytes),
        "optimizer state": format_bytes(result.optimizer_bytes),
        "peak of a step": format_bytes(result.peak_bytes),
        "steps not taken": f"{result.skipped_steps:,}",
        "rows cut": f"{result.truncated_rows:,}",
        "rows left out": f"{result.skipped_rows:,}",
    }
    return "".join(
        f"<div><dt>{name}</dt><dd>{value}</dd></div>"
        for name, value in facts.items()
        if value and value != "0"
    )


def _format(loss: float | None) -> str:
    return "" if loss is None else f"{loss:.4f}"


def _make_samples(samples: Sequence[tuple[str, str, str]]) -> str:
    if not samples:
        return ""
    rows = "".join(
        "<tr>" + "".join(f"<td>{html.escape(text)}</td>" for text in texts) + "</tr>"
        for texts in samples
    )
    return (
        '<h2>Answers</h2><table class="samples"><tr><th>prompt</th><th>before</th>'
        f"<th>after</th></tr>{rows}</table>"
    )


def _make_rows(config: Mapping[str, Any]) -> str:
    """Lists the options that are set, as config.yaml has them."""

    def show(value: Any) -> str:
        if isinstance(value, list):
            return ", ".join(map(str, value))
        return str(value).lower() if isinstance(value, bool) else str(value)

    return "".join(
        f"<div><dt>{html.escape(name)}</dt><dd>{html.escape(show(value))}</dd></div>"
        for name, value in config.items()
        if value is not None and value != []
    )


def _make_figure(num_axes: int, height: float) -> tuple[Any, Any]:
    # Not pyplot, which would choose a backend for the whole process.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, num_axes, squeeze=False)[0]
    for each in axes:
        each.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _plot_loss(
    steps: Sequence[Mapping[str, Any]], evaluations: Sequence[Mapping[str, Any]]
) -> Any:
    figure, (axes,) = _make_figure(1, 4)
    numbers = np.asarray([line["step"] for line in steps])
    losses = np.asarray([line["loss"] for line in steps])
    axes.plot(numbers, losses, color=_LIGHT, label="each step")
    window = max(1, len(losses) // 8)
    if window > 1:
        mean = np.convolve(losses, np.ones(window) / window, mode="valid")
        axes.plot(
            numbers[window - 1 :], mean, color=_BLUE, label=f"mean of {window} steps"
        )
    if evaluations:
        axes.plot(
            [line["step"] for line in evaluations],
            [line["eval_loss"] for line in evaluations],
            color=_ORANGE,
            marker="o",
            label="held-out",
        )
    axes.set(xlabel="step", ylabel="loss, nats per target")
    axes.legend(frameon=False)
    return figure


def _plot_speed(steps: Sequence[Mapping[str, Any]]) -> Any:
    figure, (speed, memory) = _make_figure(2, 2.6)
    numbers = [line["step"] for line in steps]
    speed.plot(numbers, [line["tokens_per_second"] for line in steps], color=_BLUE)
    speed.set(xlabel="step", ylabel="tokens/s", ylim=(0, None))
    known = [line for line in steps if line.get("memory_bytes")]
    memory.plot(
        [line["step"] for line in known],
        [line["memory_bytes"] / 2**30 for line in known],
        color=_BLUE,
    )
    memory.set(xlabel="step", ylabel="peak memory so far, GiB", ylim=(0, None))
    return figure


def _to_svg(figure: Any) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]
