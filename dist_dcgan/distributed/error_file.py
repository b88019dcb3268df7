"""Torchrun's error file of a rank, from which it prints the first failure."""

from __future__ import annotations

import json
import time
import traceback
from pathlib import Path

from torch.distributed.elastic.multiprocessing.errors import ErrorHandler

from shards.common.redaction import one_line, printable, without_secrets


class ErrorFile(ErrorHandler):
    """Writes what torch's class does, without secrets."""

    def record_exception(self, e: BaseException) -> None:
        """Write the exception and its traceback to the file that torchrun names; nothing without torchrun."""
        path = self._get_error_file_path()
        if path is None:
            return
        stack = printable(without_secrets("".join(traceback.format_exception(e))), kept="\n")
        extra = {"py_callstack": stack, "timestamp": str(int(time.time()))}
        content = {"message": {"message": one_line(f"{type(e).__name__}: {e}"), "extraInfo": extra}}
        Path(path).write_text(json.dumps(content))
