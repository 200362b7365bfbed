# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Tables in Markdown."""

from collections.abc import Iterable, Sequence


def markdown_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Set texts in a Markdown table, whose columns are aligned in plain text, too.

    Args:
        columns (Sequence[str]): Titles.
        rows (Iterable[Sequence[str]]): Cells of each row, as many as there are columns.

    Returns:
        str: The lines of the table.
    """
    # A bar would end the cell.
    lines = [[cell.replace('|', r'\|') for cell in row] for row in (columns, *rows)]
    widths = [max(len(row[i]) for row in lines) for i in range(len(columns))]
    lines.insert(1, ['-' * width for width in widths])
    return '\n'.join(
        f'| {" | ".join(cell.ljust(width) for cell, width in zip(row, widths))} |'
        for row in lines
    )
