"""What the training commands refuse of their options: one line, before anything is loaded."""

from __future__ import annotations

import importlib

import pytest

from mv2v_engine.errors import RequestError
from mv2v_engine.synthetic.worlds import HELD_OUT
from mv2v_engine.training.command import seeds, shard

DATA = ["--out", "out", "--latents", "latents"]
BASE = ["--checkpoint", "tiny-nvs"]
# the options that a command has to be given, by its module
COMMANDS = {
    "causal": ["--out", "out", "--edits", "edits", "--text", "text", "--start-from", "tiny-edit"],
    "dit": DATA,
    "edit_latents": ["--edits", "edits", "--vae", "vae", "--text", "text", "--out", "out"],
    "edits": ["--out", "out"],
    "embedded": ["--task", "views", "--out", "out"],
    "finetune": [*DATA, *BASE],
    "history": ["--stage", "1", *DATA, *BASE],
    "latents": ["--vae", "vae", "--out", "out"],
    "ranking": BASE,
    "scenes": ["--out", "out"],
    "vae": ["--scenes", "scenes", "--out", "out"],
}


def refused(module: str, monkeypatch: pytest.MonkeyPatch, *words: str) -> str:
    """What a command says of options that it does not take."""
    monkeypatch.setattr("sys.argv", [module, *COMMANDS[module], *words])
    with pytest.raises(RequestError) as caught:
        importlib.import_module(f"mv2v_engine.training.{module}").main()
    return str(caught.value)


def test_seeds_and_shards() -> None:
    assert seeds("3:5") == range(3, 5) and seeds(f"0:{HELD_OUT}") == range(HELD_OUT)
    assert [list(range(7))[shard(text)] for text in ("0/1", "1/3")] == [[*range(7)], [1, 4]]


@pytest.mark.parametrize("given", ["3", "5:2", "5:5", "a:b", "-1:2", "1/3", "1:2:3", ""])
@pytest.mark.parametrize("module", ["latents", "scenes", "edits"])
def test_seeds_that_are_none(module: str, given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    option = "--clips" if module == "edits" else "--worlds"
    said = refused(module, monkeypatch, f"{option}={given}")
    assert said.startswith(option) and "first:last" in said and repr(given) in said
    assert "held out" in refused(module, monkeypatch, option, f"0:{HELD_OUT + 1}")


@pytest.mark.parametrize("given", ["0", "2/2", "0/0", "-1/2", "a/b", "0:2"])
@pytest.mark.parametrize("module", ["latents", "edit_latents", "edits"])
def test_shards_that_are_none(module: str, given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    source = ["--worlds", "0:1"] if module == "latents" else []
    said = refused(module, monkeypatch, *source, f"--shard={given}")
    assert said.startswith("--shard: must be i/n") and repr(given) in said


@pytest.mark.parametrize(
    ("module", "option"),
    [
        *((m, "--steps") for m in ("causal", "dit", "finetune", "history", "ranking")),
        *((m, "--batch") for m in ("causal", "dit", "finetune", "history", "vae")),
        *((m, "--worlds") for m in ("embedded", "ranking")),
        *((m, "--cameras") for m in ("latents", "scenes", "ranking")),
        ("embedded", "--jobs"),
        ("history", "--rank"),
        ("history", "--max-windows"),
        ("finetune", "--accumulate"),
    ],
)
def test_counts_below_1(module: str, option: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for given in ("0", "-3"):
        said = refused(module, monkeypatch, f"{option}={given}")
        assert said.startswith(f"{option}: must be at least 1, got {given!r}")


@pytest.mark.parametrize("module", ["causal", "dit", "embedded", "finetune", "history", "vae"])
def test_times_and_rates_that_are_not_above_0(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for option in ("--minutes", "--learning-rate"):
        if (module, option) != ("embedded", "--learning-rate"):
            for given in ("0", "-1"):
                said = refused(module, monkeypatch, f"{option}={given}")
                assert said.startswith(f"{option}: must be above 0, got {given!r}")


@pytest.mark.parametrize(
    "module", ["causal", "dit", "edits", "edit_latents", "finetune", "history", "scenes", "vae"]
)
def test_devices_that_are_none(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    said = refused(module, monkeypatch, "--device", "abacus")
    assert said.startswith("device 'abacus' cannot be used")
