"""The report of a study: one HTML page with its charts inside, and the charts as files."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from stego_core.errors import ConfigError
from stego_core.metrics.criterion import CRITERIA
from stego_core.metrics.study import SCORES, StudyResult, best_trial
from stego_core.storage import fs
from stego_core.viz.charts import curves_svg, heat_map_svg


def write_study(folder_uri: str, result: StudyResult, criterion: str) -> str:
    """Write `index.html`, `curves.svg` and `interactions.svg`.

    Args:
        folder_uri: where they go.
        result: of the study.
        criterion: that the best trial is chosen by.

    Returns:
        Where the page is.

    Raises:
        ConfigError: if jinja2 is not installed; the charts are written all the same.
    """
    shares = {one.path: one.share for one in result.importances}
    curves = curves_svg(result.curves, result.target)
    heat_map = heat_map_svg({path: shares[path] for path in result.paths}, result.pairs)
    fs.write_bytes(fs.join(folder_uri, "curves.svg"), curves.encode())
    fs.write_bytes(fs.join(folder_uri, "interactions.svg"), heat_map.encode())
    page = _template().render(
        result=result,
        criterion=criterion,
        best=best_trial(result, criterion),
        statuses=_statuses(result),
        curves=curves,
        heat_map=heat_map,
        criteria=CRITERIA,
        scores=SCORES,
    )
    index = fs.join(folder_uri, "index.html")
    fs.write_bytes(index, page.encode())
    return index


def _statuses(result: StudyResult) -> dict[str, int]:
    counts: dict[str, int] = {}
    for row in result.rows:
        counts[row["status"]] = counts.get(row["status"], 0) + 1
    return dict(sorted(counts.items()))


def _template() -> Any:
    try:
        import jinja2
    except ImportError:
        raise ConfigError(
            "the report needs jinja2, which is not installed: pip install 'stego-ray[report]'"
        ) from None
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,  # the default looks at the template's suffix
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["percent"] = _percent
    environment.filters["number"] = _number
    return environment.get_template("study.html.jinja")


def _percent(share: float) -> str:
    return "–" if math.isnan(share) else f"{100 * share:.1f} %"


def _number(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}" if math.isfinite(value) else "–"
    return str(value)
