"""From what a stream's request asks for to its record: checked at the door."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

from mv2v_engine.config import StreamConfig
from mv2v_engine.engine.request import check_text
from mv2v_engine.errors import RequestError
from mv2v_engine.serving.store.streams import StreamRecord


def make_stream(
    owner: str, stream_id: str, asked: dict[str, Any], about: dict[str, Any]
) -> StreamRecord:
    """The stream that is asked for. asked: as `Streams.create`. about: as `Backend.about`.

    Raises:
        RequestError: the model cannot make it.
    """
    name, stream, sampling = about["engine"]["checkpoint"], about["stream"], about["sampling"]
    if stream is None:
        raise RequestError(
            f"{name} makes turns of sessions and no streams, which need a causal model"
        )
    blocks, policy, prompt = asked.get("blocks"), asked.get("policy"), asked.get("prompt", "")
    settings = StreamConfig(**stream["settings"])
    if policy is not None:
        if policy in stream["refused"]:
            raise RequestError(stream["refused"][policy])
        # a window that does not hold what it keeps is refused by the settings themselves
        settings = dataclasses.replace(settings, policy=policy)
    check_text(name, prompt, 1.0, has_text=about["has_text"])
    height, width = sampling["size"]
    record = StreamRecord(
        id=stream_id,
        owner=owner,
        checkpoint=name,
        prompt=prompt,
        seed=asked.get("seed", 0),
        blocks=blocks,
        policy=settings.policy,
        has_source=stream["has_source"],
        fps=sampling["fps"],
        width=width,
        height=height,
        block_frames=stream["block_frames"],
        lead=stream["lead"],
        created=time.time(),
    )
    if asked.get("frames") is not None:
        record = dataclasses.replace(record, blocks=record.num_blocks(asked["frames"]))
    if settings.policy == "all" and record.blocks is None:
        raise RequestError(
            "policy all keeps everything, so a stream of it needs an end; give blocks or frames, "
            "or another policy"
        )
    return record
