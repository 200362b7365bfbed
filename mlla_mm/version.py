# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
__version__ = '0.2.0'
