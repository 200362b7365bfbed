# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""An update depends on its number alone.

It does not matter on how many processes a run trains, nor whether it was stopped and
resumed: random numbers, data order and state follow from the number of the update.
"""

from . import loops, samplers, seeding
from .preemption import Preempted, PreemptionHook
from .resume import ResumedStateHook
from .resumed_settings import ResumedSettingsHook

__all__ = [
    'Preempted',
    'PreemptionHook',
    'ResumedSettingsHook',
    'ResumedStateHook',
    'loops',
    'samplers',
    'seeding',
]
