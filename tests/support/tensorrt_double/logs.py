"""Loggers and progress monitors: base classes for user code, and how TensorRT calls them."""

from __future__ import annotations

import sys
import time
import traceback
from typing import Any


class ILogger:
    """Base class whose `log` must be overridden."""

    virtual = True

    def __init__(self, api: Any) -> None:
        pass


class IProgressMonitor(ILogger):
    """Base class whose three methods must be overridden."""


class IErrorRecorder(ILogger):
    """Base class in name only: nothing here reports to one."""


class Logger:
    """Logger to stdout, from a minimum severity on."""

    virtual = True

    def __init__(self, api: Any, min_severity: Any) -> None:
        self.min_severity = min_severity

    def log(self, severity: Any, msg: str) -> None:
        if int(severity) <= int(self.min_severity):
            letter = "FEWIV"[int(severity)]
            print(f"[{time.strftime('%m/%d/%Y-%H:%M:%S')}] [TRT] [{letter}] {msg}")


def call(function: Any, name: str, *args: Any, default: Any = None) -> Any:
    """Calls user code like TensorRT: exceptions, including interrupts, are printed and dropped."""
    try:
        return function(*args)
    except BaseException as error:
        print(f"[ERROR] Exception caught in {name}(): {type(error).__name__}: {error}\n",
              file=sys.stderr)  # fmt: skip
        traceback.print_tb(error.__traceback__)
        return default


class Log:
    """Writer of an implementation's messages to its user's logger."""

    def __init__(self, api: Any, logger: Any) -> None:
        self.api, self.logger = api, logger

    def write(self, severity: str, text: str) -> None:
        member = self.api.member(f"ILogger.Severity.{severity}")
        call(self.logger.log, "log", member, text)

    def error(self, where: str, text: str, code: int = 4, kind: str = "API Usage Error") -> None:
        """Logs in TensorRT's form: `where: Error Code 4: API Usage Error (text)`."""
        self.write("ERROR", f"{where}: Error Code {code}: {kind} ({text})")

    def warning(self, text: str) -> None:
        self.write("WARNING", text)
