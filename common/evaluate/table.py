"""A small table of measurements: what was measured down, by which protocol across."""

from common.evaluate.result import Result, Setting, call

Column = tuple[str, tuple[tuple[str, Setting], ...]]        # metric and settings

NONE = "-"          # not measured
WIDTH = 100         # characters of a line; columns that do not fit follow below
MEANING = {"recall": "recall@k: queries with an image of their class among the k nearest",
           "ahead": "ahead: difference of two accuracies on the same test images, in points",
           "mAP": "mAP: mean average precision over the whole ranking",
           "mAP@R": "mAP@R: the same down to rank R, the number of images of the query's class",
           "verification": "verification: pairs decided rightly, each fold by the threshold that is best on the others",
           "AUC": "AUC: how often a pair of the same scores above a pair of different ones",
           "EER": "EER: different pairs accepted where as many same ones are refused",
           "TAR": "TAR: same pairs accepted where at most the share far of the different ones is",
           "accuracy": "accuracy: pairs decided rightly by a threshold that was chosen on others",
           "false accepts": "false accepts: different pairs that it accepts (FAR)",
           "true accepts": "true accepts: same pairs that it accepts (TAR)"}


def table(rows: dict[str, list[Result]], intervals: bool = False) -> str:
    """Aligned text, one row for each name in ``rows``, one column for each protocol, whose settings follow below.

    ``intervals``: with each value's 95 % interval in brackets. What is wider than ``WIDTH`` goes on below, the names
    again before it: values of two protocols never stand in one column. Raises ValueError if a row has two results for
    one column, as it would with two layers.
    """
    cells = {name: _cells(name, results, intervals) for name, results in rows.items()}
    columns = list(dict.fromkeys(column for row in cells.values() for column in row))
    names = ["", *cells]
    bands = [[header, *(row.get(column, NONE) for row in cells.values())]
             for header, column in zip(headers(columns), columns, strict=True)]
    return "\n".join([*_folded(names, bands), "", *_notes(rows, columns)])


def _folded(names: list[str], columns: list[list[str]]) -> list[str]:
    """The lines of a table; as many columns side by side as ``WIDTH`` has room for, at least one."""
    blocks: list[list[list[str]]] = [[]]
    room = available = WIDTH - max(map(len, names))
    for column in columns:
        width = 2 + max(map(len, column))
        if width > room and blocks[-1]:
            blocks, room = [*blocks, []], available
        blocks[-1].append(column)
        room -= width
    return [line for block in blocks for line in ("", *aligned(*_filled(names, block)))][1:]


def _filled(names: list[str], columns: list[list[str]]) -> tuple[list[str], list[list[str]]]:
    """The header and those rows that have a value in one of the columns."""
    kept = [i for i in range(len(names)) if any(column[i] != NONE for column in columns)]
    return [names[i] for i in kept], [[column[i] for i in kept] for column in columns]


def aligned(names: list[str], columns: list[list[str]]) -> list[str]:
    """Lines of names, to the left, and columns, to the right."""
    sides = [[name.ljust(max(map(len, names))) for name in names],
             *([cell.rjust(max(map(len, column))) for cell in column] for column in columns)]
    return ["  ".join(line).rstrip() for line in zip(*sides, strict=True)]


def _cells(name: str, results: list[Result], intervals: bool) -> dict[Column, str]:
    row: dict[Column, str] = {}
    for result in results:
        column = column_of(result)
        if column in row:
            raise ValueError(f"table: row {name!r} has two values of {call(result.metric, result.settings())}; "
                             "give each layer a row of its own.")
        bounds = f" [{result.interval[0]:.1f}, {result.interval[1]:.1f}]" if intervals and result.interval else ""
        row[column] = result.text() + bounds
    return row


def column_of(result: Result) -> Column:
    """Values that may stand in one column have the same."""
    return result.metric, tuple(result.settings().items())


def headers(columns: list[Column]) -> list[str]:
    """The metric and its first setting; more of them where two columns of a metric would read the same."""
    return [" ".join([metric, *(f"{key}={value}" for key, value in settings[:_shown(metric, columns)])])
            for metric, settings in columns]


def _shown(metric: str, columns: list[Column]) -> int:
    """How many settings tell the columns of ``metric`` apart, at least one."""
    own = [settings for name, settings in columns if name == metric]
    most = max(map(len, own))
    return next((n for n in range(1, most) if len({settings[:n] for settings in own}) == len(own)), most)


def _notes(rows: dict[str, list[Result]], columns: list[Column]) -> list[str]:
    results = [result for row in rows.values() for result in row]
    sizes = " or ".join(dict.fromkeys(_sizes(result.protocol) for result in results))
    spread = "; ± is the standard deviation over draws of labels" if any(
        result.spread is not None for result in results) else ""
    metrics = dict.fromkeys(result.metric for result in results)
    meanings = list(dict.fromkeys(MEANING.get(metric, "Top-1 accuracy") for metric in metrics))
    what = "Top-1 accuracy in percent" if meanings == ["Top-1 accuracy"] else "In percent"
    return [f"{what}{_layers(rows)}, {sizes}{spread}.",
            *(f"{meaning}." for meaning in meanings if what == "In percent"),
            *(call(metric, dict(settings)) for metric, settings in columns)]


def _sizes(protocol: dict[str, Setting]) -> str:
    """How many images: of a probe's training and test, or of a retrieval's queries and gallery; or pairs."""
    if "pairs" in protocol:
        unread = f" ({protocol['left_out']:,} more could not be read)" if protocol.get("left_out") else ""
        return f"{protocol['same']:,} same and {protocol['different']:,} different pairs{unread}"
    if "queries" not in protocol:
        return f"{protocol['train']:,} training and {protocol['test']:,} test images"
    left_out = f" ({protocol['left_out']:,} more have none to find)" if protocol.get("left_out") else ""
    return f"{protocol['queries']:,} queries{left_out}, each against {protocol['gallery']:,} images"


def _layers(rows: dict[str, list[Result]]) -> str:
    """Whose features were measured; nothing where it was pixels, or a classifier of the run's own."""
    layers = {str(result.protocol["layer"]) for results in rows.values() for result in results}
    layers -= {"pixels", "classifier"}
    return f" on features of the {' or '.join(sorted(layers))}" if layers else ""
