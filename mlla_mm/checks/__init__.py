# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Checks before a run: of its config, of its data, and a rehearsal of the whole run."""
