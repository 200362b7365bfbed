# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""The paper's numbers, and models and runs compared with them."""
