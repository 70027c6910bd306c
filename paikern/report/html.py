"""One HTML page that needs nothing else: styles, plots and numbers inside, no script, no link."""

from __future__ import annotations

import os
from collections.abc import Sequence
from html import escape

from paikern.analysis import Topology
from paikern.masks import MaskSet
from paikern.report.files import write_atomically
from paikern.report.tables import (
    Table,
    layer_table,
    log_text,
    percent,
    printable,
    provenance_table,
)

# The policy lets a browser load nothing at all, whatever text the page was made from.
_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<title>{title}</title>
<style>
:root {{ --page: #f7f8fa; --card: #ffffff; --ink: #1f2430; --soft: #667080; --line: #e3e6eb;
  --accent: #2f7fc1; --bad: #c94f4f; }}
@media (prefers-color-scheme: dark) {{ :root {{ --page: #14171c; --card: #1c2027; --ink: #e4e7ec;
  --soft: #98a2b0; --line: #2d333c; --accent: #6aaee4; --bad: #ee8a8a; }} }}
* {{ box-sizing: border-box; }}
body {{ margin: 0; background: var(--page); color: var(--ink); line-height: 1.5;
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }}
main {{ max-width: 1060px; margin: 0 auto; padding: 40px 20px 64px; }}
h1 {{ font-size: 26px; font-weight: 650; letter-spacing: -0.01em; margin: 0 0 4px; }}
h2 {{ font-size: 17px; font-weight: 600; margin: 0 0 4px; }}
p {{ margin: 0 0 12px; color: var(--soft); max-width: 72ch; overflow-wrap: anywhere; }}
section {{ background: var(--card); border: 1px solid var(--line); border-radius: 10px;
  padding: 20px 22px; margin-top: 20px; }}
.facts {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px;
  margin-top: 22px; }}
.fact {{ background: var(--card); border: 1px solid var(--line); border-radius: 10px;
  padding: 12px 16px; }}
.fact b {{ display: block; font-size: 21px; font-weight: 620; font-variant-numeric: tabular-nums; }}
.fact span {{ color: var(--soft); font-size: 13px; }}
.scroll {{ overflow-x: auto; }}
table {{ border-collapse: collapse; width: 100%; font-size: 13.5px;
  font-variant-numeric: tabular-nums; }}
th {{ text-align: left; font-weight: 600; color: var(--soft); border-bottom: 1px solid var(--line);
  vertical-align: bottom; }}
th, td {{ padding: 5px 14px 5px 0; white-space: nowrap; }}
td.text {{ white-space: normal; overflow-wrap: anywhere; }}
tbody tr + tr td {{ border-top: 1px solid var(--line); }}
tfoot td {{ border-top: 2px solid var(--line); font-weight: 600; }}
.right {{ text-align: right; }}
.bad {{ color: var(--bad); font-weight: 600; }}
figure {{ margin: 8px 0 0; color: var(--ink); }}
figure svg {{ width: 100%; height: auto; display: block; }}
figure svg text {{ font-family: inherit !important; }}
figure svg image {{ image-rendering: pixelated; }}
footer {{ color: var(--soft); font-size: 13px; margin-top: 24px; }}
</style>
</head>
<body><main>
<h1>{title}</h1>
<p>{subtitle}</p>
{body}
</main></body>
</html>
"""


def write_report(
    masks: MaskSet,
    topology: Topology | None,
    path: str | os.PathLike[str],
    *,
    notes: Sequence[str] = (),
) -> None:
    """Write the page of one run, atomically.

    Args:
        masks: from `pk.prune` or a file; its metadata is shown and its history plotted.
        topology: `pk.analyze(model, masks, ...)`; None leaves the path statistics out.
        path: of the page.
        notes: lines to show at the top, for instance warnings.

    Raises:
        OSError: the page cannot be written; an older one is left as it was.
    """
    write_atomically(path, report_page(masks, topology, notes))


def report_page(masks: MaskSet, topology: Topology | None, notes: Sequence[str] = ()) -> str:
    """The text of the page."""
    from paikern.report import plots  # matplotlib takes a third of a second that tables do not need

    about = masks.metadata
    method, model = printable(about.get("method", "masks")), printable(about.get("model", "model"))
    body = [facts(_facts(masks, topology)), _notes(notes)]
    body.append(
        section("Layers", table_html(layer_table(masks, topology)), "What each layer keeps.")
    )
    drawn = (
        ("Density of each layer", plots.density_figure(masks, topology), ""),
        (
            "Along the run",
            plots.run_figure({method: about.get("history")}),
            "Measured on the mask after each step or round.",
        ),
        (
            "Masks",
            plots.mask_figure(masks),
            "One row an output unit, one pixel a weight; kept weights in colour.",
        ),
    )
    for index, (title, figure, text) in enumerate(drawn):
        if figure is not None:
            body.append(section(title, f"<figure>{plots.svg(figure, f'p{index}')}</figure>", text))
    body.append(section("Provenance", table_html(provenance_table(masks))))
    subtitle = f"{model}: {masks.kept:,} of {masks.total:,} weights kept"
    return page(f"{method} at {100 * masks.sparsity:.2f} % sparsity", subtitle, body)


def page(title: str, subtitle: str, body: Sequence[str]) -> str:
    """A whole page; title and subtitle are text, `body` is HTML."""
    return _PAGE.format(title=escape(title), subtitle=escape(subtitle), body="\n".join(body))


def section(title: str, html: str, text: str = "") -> str:
    """A card with a heading; `text` explains what is seen."""
    lead = f"<p>{escape(text)}</p>" if text else ""
    return f"<section><h2>{escape(title)}</h2>{lead}{html}</section>"


def facts(rows: Sequence[tuple[str, str]]) -> str:
    """The numbers to see first: (value, what it is)."""
    cells = [f'<div class="fact"><b>{escape(v)}</b><span>{escape(n)}</span></div>' for v, n in rows]
    return f'<div class="facts">{"".join(cells)}</div>'


def table_html(table: Table) -> str:
    """A `Table`, every cell escaped; it scrolls sideways where the screen is narrow."""

    def cells(row: Sequence[str], tag: str) -> str:
        made = []
        for column, cell in zip(table.columns, row, strict=True):
            names = ["right"] if column.right else []
            names += ["bad"] if cell == "dead" else []
            names += ["text"] if column.title == "value" else []
            attribute = f' class="{" ".join(names)}"' if names else ""
            made.append(f"<{tag}{attribute}>{escape(cell)}</{tag}>")
        return f"<tr>{''.join(made)}</tr>"

    head = cells([column.title for column in table.columns], "th")
    body = "\n".join(cells(row, "td") for row in table.rows)
    foot = f"<tfoot>{cells(table.footer, 'td')}</tfoot>" if table.footer else ""
    inner = f"<thead>{head}</thead>\n<tbody>{body}</tbody>{foot}"
    return f'<div class="scroll"><table>{inner}</table></div>'


def _facts(masks: MaskSet, topology: Topology | None) -> list[tuple[str, str]]:
    rows = [
        (f"{masks.kept:,}", f"weights kept of {masks.total:,}"),
        (percent(masks.kept, masks.total), "density"),
    ]
    if topology is not None:
        nodes = sum(layer.nodes for layer in topology.layers)
        dead = len(topology.dead_layers)
        rows += [
            (log_text(topology.log_paths), "log effective paths"),
            (f"{topology.effective_nodes:,}", f"effective nodes of {nodes:,}"),
            (f"{topology.effective_params:,}", "weights on a path"),
            (str(dead), "dead layer" if dead == 1 else "dead layers"),
        ]
    return rows


def _notes(notes: Sequence[str]) -> str:
    if not notes:
        return ""
    return section("Notes", "".join(f"<p>{escape(printable(note))}</p>" for note in notes))
