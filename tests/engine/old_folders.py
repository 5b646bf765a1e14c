"""Folders of sessions as the version before wrote them: the same files under another manifest."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from mv2v_engine.engine.folder import SessionFolder


def as_version_1(folder: Path) -> None:
    """Write a session's manifest in the layout of version 1, which each task had of its own."""
    store = SessionFolder(folder)
    manifest = store.read()
    rows: list[dict[str, Any]] = []
    for row in manifest["turns"]:
        camera = row["camera"]
        if camera is None:
            rows.append({name: value for name, value in row.items() if name != "camera"})
            continue
        rows.append(
            {
                "number": row["number"],
                "camera": camera["name"],
                "size": camera["size"],
                "report": row["report"],
                "sha256": row["windows"][0],
                "path": {name: camera[name] for name in ("poses", "intrinsics")},
            }
        )
    is_edit = "cuts" in manifest["identity"]
    content = {
        "id": manifest["id"],
        "identity": manifest["identity"],
        "turns": rows,
        "format": "mv2v-edit-session" if is_edit else "mv2v-session",
        "version": 1,
    }
    words = json.dumps(content, sort_keys=True, ensure_ascii=False)
    content["sha256"] = hashlib.sha256(words.encode()).hexdigest()
    store.manifest.write_text(json.dumps(content))
