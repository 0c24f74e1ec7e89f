"""A pytest plugin: a failure is printed and written to a file as it comes, so that a run that is cut off keeps it.

    pytest -p bench.failures --failures FILE ...

With pytest-xdist too. Each line of FILE is a JSON object: test, when (setup, call or teardown), text (the traceback).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--failures", metavar="FILE", type=Path, required=True, help="write failures here as they come")


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):  # of pytest-xdist, which sends reports to the main process
        config.pluginmanager.register(_Failures(config, config.getoption("--failures")))


class _Failures:
    def __init__(self, config: pytest.Config, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._config, self._file = config, path.open("w", encoding="utf-8")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if not report.failed:
            return
        failure = {"test": report.nodeid, "when": report.when, "text": report.longreprtext}
        self._file.write(json.dumps(failure) + "\n")
        self._file.flush()
        terminal: Any = self._config.pluginmanager.getplugin("terminalreporter")
        terminal.ensure_newline()
        terminal.write_line(f"FAILED {report.nodeid}, {report.when}\n{report.longreprtext}", flush=True)

    def pytest_unconfigure(self) -> None:
        self._file.close()
