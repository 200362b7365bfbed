# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
class ExportError(ValueError):
    """A model cannot be exported. The message says why, and what to do."""
