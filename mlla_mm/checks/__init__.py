# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Before a run: is its config, its data and the whole way through it all right?"""
