"""A memory entry: its size, its storage, and what it refuses."""

from __future__ import annotations

import pytest
import torch

from mv2v_engine.camera.trajectories import named_trajectory
from mv2v_engine.errors import RequestError
from mv2v_engine.memory.entry import MemoryEntry

TRAJECTORY = named_trajectory("pan_left", 5, (48, 80))


def make_entry(latents: torch.Tensor) -> MemoryEntry:
    return MemoryEntry("a", 1, latents, TRAJECTORY, "vae")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_num_bytes_counts_the_latents(dtype: torch.dtype) -> None:
    latents = torch.zeros(16, 2, 6, 10, dtype=dtype)
    assert make_entry(latents).num_bytes == 16 * 2 * 6 * 10 * dtype.itemsize


def test_a_batch_is_refused_with_its_shape() -> None:
    with pytest.raises(RequestError, match=r"\[1, 16, 2, 6, 10\]"):
        make_entry(torch.zeros(1, 16, 2, 6, 10))


def test_a_slice_does_not_keep_its_whole_storage_alive() -> None:
    whole = torch.randn(8, 16, 2, 6, 10, generator=torch.Generator().manual_seed(0))
    entry = make_entry(whole[3])
    stored = entry.stored_on(torch.device("cpu"))
    assert stored.latents.untyped_storage().nbytes() == entry.num_bytes
    assert torch.equal(stored.latents, whole[3])


def test_latents_that_own_their_storage_are_not_copied() -> None:
    latents = torch.zeros(16, 2, 6, 10)
    stored = make_entry(latents).stored_on(torch.device("cpu"))
    assert stored.latents.data_ptr() == latents.data_ptr()


def test_stored_latents_carry_no_graph() -> None:
    latents = torch.zeros(16, 2, 6, 10, requires_grad=True) * 2
    assert not make_entry(latents).stored_on(torch.device("cpu")).latents.requires_grad


def test_an_edited_segment_has_no_camera() -> None:
    segment = MemoryEntry("a", 1, torch.zeros(16, 2, 6, 10), None, "vae")
    with pytest.raises(RequestError, match=r"memory 'a' is an edited segment.*by its source"):
        _ = segment.camera
    assert make_entry(segment.latents).camera is TRAJECTORY
