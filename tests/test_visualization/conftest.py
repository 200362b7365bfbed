# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
import pytest
from matplotlib.figure import Figure


@pytest.fixture
def figures(monkeypatch):
    """The figures that were saved, as Matplotlib's objects."""
    saved = []
    savefig = Figure.savefig

    def save(figure, *args, **kwargs):
        savefig(figure, *args, **kwargs)
        saved.append(figure)

    monkeypatch.setattr(Figure, 'savefig', save)
    return saved
