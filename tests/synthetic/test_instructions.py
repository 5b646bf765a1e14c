"""The language is closed: every prompt is one instruction's, every word is listed."""

from __future__ import annotations

import pytest

from mv2v_engine.errors import RequestError
from mv2v_engine.synthetic.instructions import (
    KINDS,
    Instruction,
    all_instructions,
    all_prompts,
    vocabulary,
)


def test_a_prompt_means_one_thing() -> None:
    instructions = list(all_instructions())
    assert len({instruction.prompt for instruction in instructions}) == len(instructions)
    assert all_prompts() == tuple(instruction.prompt for instruction in instructions)
    assert {instruction.kind for instruction in instructions} == set(KINDS)
    assert max(len(prompt.split()) for prompt in all_prompts()) == 9


def test_the_words() -> None:
    words = vocabulary()
    assert list(words) == sorted(set(words)) and len(words) < 64
    assert {"sphere", "hat", "striped", "stripes", "wall", "purple", "remove"} <= set(words)


@pytest.mark.parametrize(
    ("instruction", "prompt"),
    [
        (Instruction(kind="colour", target="sphere", value="red"), "make the sphere red"),
        (Instruction(kind="paint", target="back wall"), "paint the back wall"),
        (Instruction(kind="hat", target="tall box"), "add a hat to the tall box"),
        (
            Instruction(kind="pattern", target="drum", value="checked", phrasing=3),
            "cover the drum with checks",
        ),
        (Instruction(kind="remove", target="ball", phrasing=1), "take the ball away"),
    ],
)
def test_prompts(instruction: Instruction, prompt: str) -> None:
    assert instruction.prompt == prompt
    assert prompt in all_prompts()
    assert instruction.is_open == (instruction.kind != "remove")


def test_what_it_cannot_say() -> None:
    with pytest.raises(RequestError, match=r"no kind of edit 'hats'; nearest: hat"):
        Instruction(kind="hats", target="box")  # type: ignore[arg-type]
    with pytest.raises(RequestError, match=r"'colour' takes a value of .*'red'.*got 'grey'"):
        Instruction(kind="colour", target="box", value="grey")
    with pytest.raises(RequestError, match=r"phrasings 0\.\.3, got 4"):
        Instruction(kind="hat", target="box", phrasing=4)
