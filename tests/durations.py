# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Plugin of pytest that keeps the usual tests short."""

import pytest

_SECONDS = pytest.StashKey[float]()


class Durations:
    """Names tests that take long with the fixtures made for them; too long ones fail.

    Those that are marked slow may take what they need.

    Args:
        long (float): Seconds from which on a test is named in the summary.
        too_long (float): Seconds from which on it fails.
    """

    def __init__(self, long: float, too_long: float) -> None:
        self.long = long
        self.too_long = too_long

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_makereport(self, item, call):
        outcome = yield
        seconds = item.stash.get(_SECONDS, 0.0) + call.duration
        item.stash[_SECONDS] = seconds
        if call.when != 'teardown' or item.get_closest_marker('slow'):
            return
        report = outcome.get_result()
        message = (
            f'{item.nodeid} took {seconds:.0f} s. Make it quicker, or mark it slow.'
        )
        if seconds > self.too_long and report.passed:
            report.outcome, report.longrepr = 'failed', message
        elif seconds > self.long:
            item.warn(pytest.PytestWarning(message))
