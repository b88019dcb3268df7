"""Torchrun's error file of a rank, from which it prints the first failure."""

from __future__ import annotations

import json
import time
from pathlib import Path

from torch.distributed.elastic.multiprocessing.errors import ErrorHandler

from shards.common.files import publish
from shards.common.messages import traceback_of, warn
from shards.common.redaction import one_line


class ErrorFile(ErrorHandler):
    """Writes what torch's class does, without secrets."""

    def record_exception(self, e: BaseException) -> None:
        """Write the exception and its traceback to the file that torchrun names; nothing without torchrun."""
        path = self._get_error_file_path()
        if path is None:
            return
        extra = {"py_callstack": traceback_of(e), "timestamp": str(int(time.time()))}
        content = {"message": {"message": one_line(f"{type(e).__name__}: {e}"), "extraInfo": extra}}
        try:
            publish(Path(path), json.dumps(content).encode())
        except OSError as error:  # the exception itself, which is raised next, matters more
            warn(f"torchrun's error file cannot be written: {error}")
