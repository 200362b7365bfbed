# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""What other packages have no public name for, each with the versions it is for.

The rest of the package touches private names of other packages through these modules
alone. Nothing of ours is imported from outside this folder.
"""
