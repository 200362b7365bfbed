# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Versions and private names of other packages.

Only this folder uses private names of other packages, and it says for which versions.
It imports nothing from the other folders of this package.
"""
