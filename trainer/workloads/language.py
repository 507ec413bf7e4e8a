"""A language model: a recurrent network that reads a text on from window to window, and writes more of it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from ..config.options import OptimizerOptions, WorkloadOptions
from ..data.description import Batch, TokenDescription
from ..data.text import Tokenizer
from ..figures import ScalarDisplay
from ..metrics.evaluator import Evaluator, Scores, Totals
from ..nn import optim
from ..nn.dropout import Dropout, drawing
from ..nn.row_state import RowState
from ..randomness import Draws
from ..workload import Phase, Scalars, Workload

DATA = TokenDescription
CELLS = {"rnn": nn.RNN, "gru": nn.GRU, "lstm": nn.LSTM}
RULE = f"\n{'-' * 40}\n"  # between two texts that are written during training

SCALARS = {
    "bits_per_character": ScalarDisplay(True, "bits/char", baseline="ngram_bits_per_character"),
    "ngram_bits_per_character": ScalarDisplay(True, "n-gram"),
    "perplexity": ScalarDisplay(True),
    "loss": ScalarDisplay(),
}


class Options(WorkloadOptions):
    cell: Literal["rnn", "gru", "lstm"] = "lstm"
    """Elman's (1990) with tanh, GRU (Cho et al. 2014) or LSTM (Hochreiter and Schmidhuber 1997)."""
    width: int = Field(256, ge=1)
    """Length of the hidden state."""
    layers: int = Field(1, ge=1)
    """Recurrent layers, one above the other."""
    embedding: int | None = Field(None, ge=1)
    """Length of a token's embedding. Default: the width."""
    tied: bool = False
    """Predict by the embeddings themselves (Press and Wolf 2017), which are then as long as the width."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Share of the inputs of every layer that is left out, the same at each token of a window (Gal and Ghahramani
    2016)."""
    temperature: float = Field(0.8, ge=0)
    """Of the texts that are written during training: below 1 more typical, above 1 more varied; 0 is the likeliest."""
    written: int = Field(300, ge=1)
    """Length in tokens of the texts that are written during training."""


def build(options: Options, data: TokenDescription, optimizer: OptimizerOptions) -> Workload:
    if options.tied and options.embedding not in (None, options.width):
        raise ValueError(
            f"workload.embedding: {options.embedding} is not the width, {options.width}, which workload.tied needs: "
            f"leave it out"
        )
    return Language(options, data, optimizer)


class Recurrent(nn.Module):
    """Tokens (B, T) int64 and the state before them to logits (B, T, vocabulary) and the state behind them.

    A state is the hidden one, and of an LSTM that of its cells too, each (B, layers, width).
    """

    def __init__(self, options: Options, vocabulary: int) -> None:
        super().__init__()
        width, length = options.width, options.embedding or options.width
        self.embed = nn.Embedding(vocabulary, length)
        self.layers = nn.ModuleList(
            CELLS[options.cell](width if above else length, width, batch_first=True) for above in range(options.layers)
        )
        self.dropouts = nn.ModuleList(
            Dropout(options.dropout, f"dropout{place}", "steps") for place in range(options.layers + 1)
        )
        self.predict = nn.Linear(width, vocabulary)
        if options.tied:
            nn.init.normal_(self.embed.weight, std=width**-0.5)  # as logits, unit vectors would be too large
            self.predict.weight = self.embed.weight

    def forward(self, tokens: Tensor, hidden: Tensor, cell: Tensor | None = None) -> tuple[Tensor, ...]:
        features, before = self.dropouts[0](self.embed(tokens)), (hidden,) if cell is None else (hidden, cell)
        ends = []
        for index, layer in enumerate(self.layers):
            # A layer has its states as (1, B, width), an LSTM as a pair of them.
            start = [state[:, index].unsqueeze(0).contiguous() for state in before]
            features, end = layer(features, start[0] if cell is None else tuple(start))
            ends.append((end,) if cell is None else end)
            features = self.dropouts[index + 1](features)
        behind = (torch.cat(states).transpose(0, 1) for states in zip(*ends, strict=True))
        return self.predict(features), *behind


class Language(Workload):
    data: TokenDescription
    writes = True

    def __init__(self, options: Options, data: TokenDescription, optimizer: OptimizerOptions) -> None:
        super().__init__()
        self.options, self.data, self.scalars = options, data, SCALARS
        self.tokenizer = Tokenizer(data.vocabulary)
        self.network = Recurrent(options, len(data.vocabulary))
        shape = (options.layers, options.width)
        self.states = {name: RowState(shape) for name in ("hidden", "cell")[: 1 + (options.cell == "lstm")]}
        for name, state in self.states.items():
            self.add_module(name, state)
        self.phases = (Phase("predict", self.loss, optim.build(optimizer, self.network)),)

    def nats(self, batch: Batch, draws: Draws) -> Tensor:
        """What each predicted token costs, (B, length); moves the state of the rows on."""
        tokens = batch["tokens"]
        with drawing(self.network, draws):
            logits, *ends = self.network(tokens[:, :-1], *(state.read(draws) for state in self.states.values()))
        for state, value in zip(self.states.values(), ends, strict=True):
            state.write(draws, value)
        return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none").view(len(tokens), -1)

    def loss(self, batch: Batch, draws: Draws) -> tuple[Tensor, Scalars]:
        loss = self.nats(batch, draws).mean()
        bits = loss.detach() / (math.log(2) * self.data.characters)
        return loss, {"loss": loss.detach(), "bits_per_character": bits}

    def evaluator(self, scores: Callable[[], Scores]) -> Evaluator:
        return LanguageEvaluator(self)

    def inference(self) -> nn.Module:
        return self.network

    def example(self) -> dict[str, Tensor]:
        """One token, and the state behind those before it: what writing takes."""
        draws = Draws(0, ("example",), slice(0, 2), torch.device("cpu"))
        options, tokens = self.options, draws.integers("tokens", len(self.data.vocabulary), (1,))
        return {"tokens": tokens} | {name: draws.normal(name, (options.layers, options.width)) for name in self.states}

    def samples(self, draws: Draws, label: int | None = None, truncation: float | None = None) -> str:
        return RULE.join(self.write(draws, "", self.options.written, self.options.temperature)) + "\n"

    @torch.no_grad()
    def write(self, draws: Draws, prompt: str, length: int, temperature: float) -> list[str]:
        if unknown := self.tokenizer.unknown(prompt):
            raise ValueError(f"{''.join(unknown)!r} is not in the vocabulary of {self.data.name}")
        ids = self.tokenizer.encode(prompt) or [self.tokenizer.ids.get("\n", 0)]  # a text begins behind a line's end
        rows = draws.rows.stop - draws.rows.start
        tokens = torch.tensor([ids], device=draws.device).expand(rows, -1)
        like = next(self.network.parameters())
        state = [like.new_zeros(rows, self.options.layers, self.options.width) for _ in self.states]
        chances, written = draws.uniform("text", (length,)), []
        for chance in chances.unbind(1):
            logits, *state = self.network(tokens, *state)
            tokens = _choose(logits[:, -1], chance, temperature)[:, None]
            written.append(tokens)
        return [prompt + self.tokenizer.decode(row) for row in torch.cat(written, 1).tolist()]


def _choose(logits: Tensor, chance: Tensor, temperature: float) -> Tensor:
    """A token (B,) for each row, at the place in the distribution that `chance` (B,) says."""
    if temperature == 0:
        return logits.argmax(1)
    above = (logits - logits.amax(1, keepdim=True)).double()  # so that no temperature makes infinity of the likeliest
    ends = (above / temperature).softmax(1).cumsum(1)
    return torch.searchsorted(ends, chance[:, None].double().contiguous()).clamp(max=logits.shape[1] - 1)[:, 0]


class LanguageEvaluator:
    """Nats over tokens, and over the characters that they stand for."""

    headline, maximise = "bits_per_character", False

    def __init__(self, workload: Language) -> None:
        self.workload = workload
        self.lengths = torch.tensor([len(token) for token in workload.data.vocabulary])

    def totals(self, batch: Batch, draws: Draws) -> Totals:
        nats, predicted = self.workload.nats(batch, draws), batch["tokens"][:, 1:]
        sums = {
            "nats": nats.double().sum(),
            "tokens": torch.tensor(predicted.numel()),
            "characters": self.lengths.to(predicted.device)[predicted].sum(),
        }
        return sums | ({"ngram_nats": batch["ngram_nats"].double().sum()} if "ngram_nats" in batch else {})

    def report(self, totals: Totals) -> dict[str, float]:
        nats, bits = float(totals["nats"]), math.log(2) * float(totals["characters"])
        loss = nats / float(totals["tokens"])
        metrics = {"bits_per_character": nats / bits, "loss": loss, "perplexity": math.exp(min(loss, 700))}
        if "ngram_nats" in totals:
            metrics["ngram_bits_per_character"] = float(totals["ngram_nats"]) / bits
        return metrics
