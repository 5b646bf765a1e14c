"""The small text encoder: every word of the language is a token, every prompt is told apart."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mv2v_engine.synthetic.instructions import all_instructions, all_prompts, vocabulary
from mv2v_engine.text import TextEncoder, load_text_encoder
from mv2v_engine.training import text
from mv2v_engine.training.text import TEXT_DIM, TEXT_LEN, VOCAB_SIZE, write_text_encoder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text")
    write_text_encoder(path)
    return path


@pytest.fixture(scope="module")
def encoder(folder: Path) -> TextEncoder:
    return load_text_encoder(
        folder / "text_encoder",
        folder / "tokenizer",
        max_length=TEXT_LEN,
        device=torch.device("cpu"),
        dtype=torch.float32,
    )


@pytest.fixture(scope="module")
def pooled(encoder: TextEncoder) -> Tensor:
    """Sums over tokens [prompts, dim] of every prompt's embedding."""
    tokens = encoder.tokenizer(
        list(all_prompts()), padding="max_length", max_length=TEXT_LEN, return_tensors="pt"
    )
    mask = tokens["attention_mask"]
    with torch.no_grad():
        hidden: Tensor = encoder.model(tokens["input_ids"], mask).last_hidden_state
    return (hidden * mask[..., None]).sum(1)


def test_the_folder_is_small_and_the_same_every_time(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = torch.random.get_rng_state()
    monkeypatch.setattr("sys.argv", ["text", "--out", str(tmp_path)])
    text.main()
    assert torch.equal(torch.random.get_rng_state(), state)
    files = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    for name in files:
        assert (folder / name).read_bytes() == (tmp_path / name).read_bytes()
    assert sum((folder / name).stat().st_size for name in files) < 400_000
    said = json.loads((folder / "tokenizer" / "tokenizer_config.json").read_text())
    # a name that transformers 4 and 5 both know
    assert said["tokenizer_class"] == "PreTrainedTokenizerFast"
    other = tmp_path / "other"
    write_text_encoder(other, seed=1)
    weights = Path("text_encoder") / "model.safetensors"
    assert (folder / weights).read_bytes() != (other / weights).read_bytes()


def test_words_are_tokens_and_other_words_are_spelt(encoder: TextEncoder) -> None:
    tokenizer = encoder.tokenizer
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (0, 1, 2)
    assert len(tokenizer) <= VOCAB_SIZE
    for word in vocabulary():
        assert len(tokenizer.tokenize(word)) == 1
    for prompt in all_prompts():
        ids = tokenizer(prompt)["input_ids"]
        assert ids[-1] == 1 and 2 not in ids and len(ids) == len(prompt.split()) + 1
    assert tokenizer.tokenize("Make it REDDISH")[-1] != tokenizer.unk_token
    assert tokenizer.unk_token_id not in tokenizer("a reddish, 2nd dog's hat!")["input_ids"]
    assert tokenizer("make the box \u96ea")["input_ids"].count(tokenizer.unk_token_id) == 1


def test_embeddings_through_the_engines_loader(encoder: TextEncoder) -> None:
    short = encoder.encode("make the sphere red")
    assert short.shape == (1, TEXT_LEN, TEXT_DIM) and encoder.dim == TEXT_DIM
    assert bool(short[0, :5].any(-1).all()) and not short[0, 5:].any()
    assert not encoder.encode("")[0, 1:].any()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encoder.encode("place a hat on top of the yellow cylinder")
    with pytest.warns(UserWarning, match=r"the prompt has 21 tokens, the model reads 16"):
        encoder.encode("make the red sphere green " * 4)


def test_prompts_are_told_apart_by_their_order_too(pooled: Tensor) -> None:
    distance = torch.cdist(pooled, pooled)
    distance.fill_diagonal_(torch.inf)
    # words in another order: a tenth of what other words make is far above rounding
    assert float(distance.min()) > 0.1 * float(distance[distance.isfinite()].median())


@pytest.mark.parametrize(
    ("attribute", "least"), [("kind", 0.97), ("value", 0.97), ("noun", 0.97), ("target", 0.7)]
)
def test_what_is_asked_can_be_read_linearly(pooled: Tensor, attribute: str, least: float) -> None:
    """Ridge regression on three quarters of the prompts, tested on the others."""
    read: Callable[..., str] = (
        (lambda instruction: instruction.target.split()[-1])
        if attribute == "noun"
        else (lambda instruction: getattr(instruction, attribute))
    )
    names = [read(instruction) for instruction in all_instructions()]
    known = sorted(set(names))
    labels = torch.tensor([known.index(name) for name in names])
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    cut = len(order) * 3 // 4
    train, test = order[:cut], order[cut:]
    x = torch.cat([pooled, torch.ones(len(pooled), 1)], dim=1).double()
    y = torch.nn.functional.one_hot(labels, len(known)).double()
    gram = x[train].T @ x[train] + 0.1 * torch.eye(x.shape[1], dtype=torch.float64)
    weights = torch.linalg.solve(gram, x[train].T @ y[train])
    accuracy = ((x[test] @ weights).argmax(1) == labels[test]).float().mean()
    assert float(accuracy) >= least
