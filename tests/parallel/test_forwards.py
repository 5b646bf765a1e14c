"""A forward whose tokens lie over two processes is that of one process."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.launched import both_succeed

Results = tuple[dict[str, Any], dict[str, Any]]
VIEWS = ("target alone", "uneven heads", "merged", "merged in joint scope", "discarded")
STATIC = ("static", "static, merged")
NAMES = (*VIEWS, *STATIC, "prope, merged", "static, prope", "edit", "static edit")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    folder = tmp_path_factory.mktemp("forwards")
    both_succeed("-m", "tests.parallel.forwards", str(folder))
    first, second = (json.loads((folder / f"rank{rank}.json").read_text()) for rank in (0, 1))
    return first, second


@pytest.mark.parametrize("name", [*NAMES, "timesteps of frames"])
def test_equal_to_one_process(results: Results, name: str) -> None:
    """Attention is the same per head, to the bit; a product of fewer rows may round otherwise."""
    for result in results:
        assert result[name]["differences"]
        assert max(result[name]["differences"]) < 1e-6


@pytest.mark.parametrize("name", NAMES)
def test_every_rank_has_the_same_bits_and_chooses_alike(results: Results, name: str) -> None:
    first, second = (result[name] for result in results)
    for what in ("scores", "merged", "velocity"):
        assert first[what] == second[what]
    assert first["merged"] == first["merged_alone"]
    if "merged" in name or name in ("discarded", "edit"):
        assert first["merged"]


@pytest.mark.parametrize("name", NAMES)
def test_the_bytes_are_those_of_the_plan(results: Results, name: str) -> None:
    for result in results:
        assert 0 < result[name]["received"] == result[name]["predicted"]


def test_what_cannot_be_shared_is_refused(results: Results) -> None:
    for result in results:
        assert (
            "context=2 leaves ranks without an attention head: the model has 1"
            in (result["one head"])
        )
        assert "1 target tokens cannot be shared by context=2 ranks" in result["one token"]


def test_a_rank_that_does_not_come_is_not_waited_for(results: Results) -> None:
    """The error is known for one of the ranks' talk, which makes it a `ParallelError`."""
    ((is_of_the_group, said),) = results[0]["absent"]
    assert is_of_the_group, said
    assert "1000ms" in said
