"""Files that appear whole or not at all."""

from __future__ import annotations

import json
import math
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def write_atomically(path: str | os.PathLike[str], content: str | bytes) -> None:
    """Write `content` so that whoever reads `path` sees the old file or the whole new one.

    Text is written as UTF-8. The folder must exist.

    Raises:
        OSError: as the file system says; `path` is then as it was and no other file is left.
    """
    data = content.encode("utf-8") if isinstance(content, str) else content
    target = Path(os.path.realpath(path))  # the target of a link is replaced, not the link
    temporary = target.with_name(f".{target.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def to_json(value: Any) -> str:
    """Strict JSON: NaN and infinity, which JSON does not have, become null.

    >>> print(to_json({"log_paths": float("-inf"), "kept": 3}))
    {
      "log_paths": null,
      "kept": 3
    }
    """
    return json.dumps(_finite(value), indent=2, allow_nan=False, default=str)


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """`to_json` into a file, atomically."""
    write_atomically(path, to_json(value) + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value
