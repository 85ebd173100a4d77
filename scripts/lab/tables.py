"""Tables as text: aligned columns for a terminal, and Markdown."""

from collections.abc import Iterable, Sequence


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """Lines of cells in columns, two blanks between them."""
    columns = zip(*lines, strict=True)
    widths = [max(map(len, column)) for column in columns]

    rows = []
    for line in lines:
        cells = []
        for cell, width in zip(line, widths, strict=True):
            cells.append(cell.ljust(width))
        row = "  ".join(cells)
        rows.append(row.rstrip())
    return "\n".join(rows)


def markdown_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table with a heading for each column, without a line break at its end."""
    rule = "|" + "---|" * len(columns)
    lines = [_markdown_row(columns), rule]
    for cells in rows:
        line = _markdown_row(cells)
        lines.append(line)
    return "\n".join(lines)


def _markdown_row(cells: Sequence[str]) -> str:
    text = " | ".join(cells)
    return f"| {text} |"
