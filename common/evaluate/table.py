"""A small table of measurements: what was measured down, by which protocol across."""

from common.evaluate.result import Result, Setting, call

Column = tuple[str, tuple[tuple[str, Setting], ...]]        # metric and settings


def table(rows: dict[str, list[Result]], intervals: bool = False) -> str:
    """Aligned text, one row for each name in ``rows``, one column for each protocol, whose settings follow below.

    ``intervals``: with each value's 95 % interval in brackets. Raises ValueError if a row has two results for one
    column, as it would with two layers.
    """
    cells = {name: _cells(name, results, intervals) for name, results in rows.items()}
    columns = list(dict.fromkeys(column for row in cells.values() for column in row))
    lines = [["", *_headers(columns)]]
    lines += [[name, *(row.get(column, "-") for column in columns)] for name, row in cells.items()]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = ["  ".join(cell.rjust(width) if place else cell.ljust(width)
                      for place, (cell, width) in enumerate(zip(line, widths, strict=True))).rstrip() for line in lines]
    return "\n".join([*text, "", *_notes(rows, columns)])


def _cells(name: str, results: list[Result], intervals: bool) -> dict[Column, str]:
    row: dict[Column, str] = {}
    for result in results:
        column = result.metric, tuple(result.settings().items())
        if column in row:
            raise ValueError(f"table: row {name!r} has two values of {call(result.metric, result.settings())}; "
                             "give each layer a row of its own.")
        bounds = f" [{result.interval[0]:.1f}, {result.interval[1]:.1f}]" if intervals and result.interval else ""
        row[column] = result.text() + bounds
    return row


def _headers(columns: list[Column]) -> list[str]:
    """The metric and its first setting; more of them where two columns would read the same."""
    for shown in range(1, 1 + max((len(settings) for _, settings in columns), default=0)):
        headers = [" ".join([metric, *(f"{key}={value}" for key, value in settings[:shown])])
                   for metric, settings in columns]
        if len(set(headers)) == len(columns):
            break
    return headers if columns else []


def _notes(rows: dict[str, list[Result]], columns: list[Column]) -> list[str]:
    sizes = {(result.protocol["train"], result.protocol["test"]) for results in rows.values() for result in results}
    images = " or ".join(f"{train:,} training and {test:,} test images" for train, test in sorted(sizes))
    spread = "; ± is the standard deviation over draws of labels" if any(
        result.spread is not None for results in rows.values() for result in results) else ""
    return [f"Top-1 accuracy in percent{_layers(rows)}, {images}{spread}.",
            *(call(metric, dict(settings)) for metric, settings in columns)]


def _layers(rows: dict[str, list[Result]]) -> str:
    """Whose features were measured; nothing where it was only pixels."""
    layers = {str(result.protocol["layer"]) for results in rows.values() for result in results} - {"pixels"}
    return f" on features of the {' or '.join(sorted(layers))}" if layers else ""
