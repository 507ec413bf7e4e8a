"""The language model: what it carries from window to window, what it is measured by, what it writes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from trainer import workloads
from trainer.config.options import UserError
from trainer.data.dataset import Memory
from trainer.data.text import UNKNOWN
from trainer.distributed.process import ProcessInfo
from trainer.distributed.runtime import Runtime
from trainer.evaluation import evaluate
from trainer.randomness import Draws
from trainer.run.build import Recipe, recipe
from trainer.workloads.language import Language, _choose

TEXT = "the cat sat on the mat, and the rat sat on the cat; " * 40


@pytest.fixture
def parts(tmp_path: Path) -> Any:
    """Makes the recipe of a config."""
    (tmp_path / "own.txt").write_text(TEXT)

    def make(cell: str = "lstm", data: dict[str, Any] | None = None, **options: Any) -> Recipe:
        model = workloads.config_model("language")
        data = {"name": "text", "root": str(tmp_path / "own.txt"), "length": 8, **(data or {})}
        workload = {"name": "language", "cell": cell, "width": 6, "layers": 2, **options}
        evaluation = {"batch_size": 3}
        made = recipe(model(workload=workload, data=data, evaluate=evaluation, batch_size=4), 1)  # type: ignore[arg-type]
        made.workload.double()
        return made

    return make


def draws(rows: int, first: int = 0, scope: tuple[object, ...] = ()) -> Draws:
    return Draws(0, scope, slice(first, first + rows), torch.device("cpu"), torch.float64)


def evaluated(made: Recipe) -> dict[str, float]:
    with Runtime(ProcessInfo(), precision="fp64", threads=1) as runtime:
        result = evaluate(made.workload, made.evaluator, made.open_loader(runtime), runtime, 0)
    assert result is not None
    return result[1]


@pytest.mark.parametrize("cell", ["rnn", "gru", "lstm"])
def test_windows_read_one_after_the_other_are_one_long_text(cell: str, parts: Any) -> None:
    workload = parts(cell).workload
    assert isinstance(workload, Language)
    text = torch.randint(9, (2, 25), generator=torch.Generator().manual_seed(0))
    for state in workload.states.values():
        state.allocate([2], 2)
    windows = [workload.nats({"tokens": text[:, start : start + 9]}, draws(2)) for start in (0, 8, 16)]
    zero = [torch.zeros(2, 2, 6, dtype=torch.float64) for _ in workload.states]
    logits = workload.network(text[:, :-1], *zero)[0]
    whole = F.cross_entropy(logits.transpose(1, 2), text[:, 1:], reduction="none")
    torch.testing.assert_close(torch.cat(windows, 1), whole)


@pytest.mark.parametrize("data", [{}, {"level": "word", "vocabulary": 3}])
def test_bits_are_those_of_all_characters_whatever_the_tokens(data: dict[str, Any], parts: Any) -> None:
    made = parts(data=data)
    metrics = evaluated(made)
    held_out, vocabulary = made.data.held_out, made.data.description.vocabulary
    assert isinstance(held_out, Memory)
    predicted = held_out["tokens"][:, 1:].flatten().tolist()
    characters = sum(len(vocabulary[token]) for token in predicted)
    assert metrics["bits_per_character"] == pytest.approx(metrics["loss"] * len(predicted) / characters / math.log(2))
    assert metrics["perplexity"] == pytest.approx(math.exp(metrics["loss"]))
    nats = float(held_out["ngram_nats"].sum())
    assert metrics["ngram_bits_per_character"] == pytest.approx(nats / characters / math.log(2))
    assert metrics["ngram_bits_per_character"] < 1  # a text that repeats itself


def test_a_network_that_knows_nothing_costs_the_logarithm_of_the_vocabulary(parts: Any) -> None:
    made = parts()
    for parameter in made.workload.network.predict.parameters():
        torch.nn.init.zeros_(parameter)
    size = len(made.data.description.vocabulary)
    assert evaluated(made)["bits_per_character"] == pytest.approx(math.log2(size))
    assert evaluated(made)["perplexity"] == pytest.approx(size)


def test_dropout_leaves_out_the_same_inputs_in_a_whole_window_and_none_when_evaluating(parts: Any) -> None:
    workload = parts(dropout=0.5, embedding=40).workload
    dropped: list[Tensor] = []
    workload.network.dropouts[0].register_forward_hook(lambda module, inputs, output: dropped.append(output == 0))
    for state in workload.states.values():
        state.allocate([3], 3)
    batch = {"tokens": torch.zeros(3, 9, dtype=torch.int64)}
    workload.train().nats(batch, draws(3))
    (masks,) = dropped
    assert torch.equal(masks, masks[:, :1].expand_as(masks))
    assert 0.2 < masks.double().mean() < 0.8
    assert not torch.equal(masks[0], masks[1])
    workload.eval().nats(batch, draws(3))
    assert not dropped[1].any()


def test_tied_weights_are_one_parameter(parts: Any) -> None:
    tied, apart = parts(tied=True).workload.network, parts().workload.network
    assert tied.predict.weight is tied.embed.weight
    assert sum(p.numel() for p in apart.parameters()) - sum(p.numel() for p in tied.parameters()) == 6 * len(
        tied.embed.weight
    )
    with pytest.raises(UserError, match=r"workload\.embedding: 4 is not the width, 6, which workload\.tied needs"):
        parts(tied=True, embedding=4)


# Writing


def test_each_row_writes_its_own_text_whoever_writes_beside_it(parts: Any) -> None:
    workload = parts().workload.eval()
    together = workload.write(draws(5), "the ", 20, 1.0)
    assert workload.write(draws(2, 3), "the ", 20, 1.0) == together[3:]
    assert len(set(together)) == 5
    assert all(text.startswith("the ") and len(text) == 24 for text in together)
    assert workload.write(draws(5, scope=("other",)), "the ", 20, 1.0) != together


def test_without_temperature_the_likeliest_token_comes_next(parts: Any) -> None:
    workload = parts("gru").workload.eval()
    first, second = workload.write(draws(2), "a cat", 6, 0.0)
    assert first == second == workload.write(draws(1), "a cat", 6, 1e-300)[0]
    ids = workload.tokenizer.encode(first)
    zero = torch.zeros(1, 2, 6, dtype=torch.float64)
    logits = workload.network(torch.tensor([ids[:-1]]), zero)[0]
    assert logits[0, 4:].argmax(1).tolist() == ids[5:]


def test_tokens_are_chosen_as_often_as_they_are_likely() -> None:
    logits, count = torch.tensor([0.3, -1.0, 0.9, 0.0]), 40_000
    chances = torch.rand(count, generator=torch.Generator().manual_seed(0))
    for temperature in (0.5, 1.0, 2.0):
        chosen = _choose(logits.expand(count, -1), chances, temperature)
        shares = torch.bincount(chosen, minlength=4) / count
        torch.testing.assert_close(shares, (logits / temperature).softmax(0), atol=0.01, rtol=0)


def test_a_prompt_of_other_characters_is_refused_by_name(parts: Any) -> None:
    workload = parts().workload.eval()
    with pytest.raises(ValueError, match="'Zé' is not in the vocabulary of text"):
        workload.write(draws(1), "Zé cat", 5, 1.0)
    assert UNKNOWN in workload.data.vocabulary
    assert workload.write(draws(1), "", 5, 1.0)[0] != ""
