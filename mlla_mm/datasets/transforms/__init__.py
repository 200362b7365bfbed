# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
