"""A workload of one's own: a GRU that reads on from window to window, for `--workload.name path/to/tiny_rnn.py`."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from trainer.config.options import OptimizerOptions, WorkloadOptions
from trainer.data.description import Batch, TokenDescription
from trainer.figures import ScalarDisplay
from trainer.metrics.evaluator import Evaluator, Scores, Totals
from trainer.nn import optim
from trainer.nn.row_state import RowState
from trainer.randomness import Draws
from trainer.workload import Phase, Scalars, Workload

DATA = TokenDescription


class Options(WorkloadOptions):
    width: int = Field(8, ge=1)
    """Length of the hidden state."""


def build(options: Options, data: TokenDescription, optimizer: OptimizerOptions) -> Workload:
    return TinyRnn(options, data, optimizer)


class TinyRnn(Workload):
    data: TokenDescription

    def __init__(self, options: Options, data: TokenDescription, optimizer: OptimizerOptions) -> None:
        super().__init__()
        self.data, self.scalars = data, {"nats": ScalarDisplay(True, "nats a token")}
        self.embed = nn.Embedding(len(data.vocabulary), options.width)
        self.gru = nn.GRU(options.width, options.width, batch_first=True)
        self.last = nn.Linear(options.width, len(data.vocabulary))
        self.hidden = RowState((1, options.width), axis=1)  # (layers, rows, width)
        self.phases = (Phase("predict", self.loss, optim.build(optimizer, self)),)

    def nats(self, batch: Batch, draws: Draws) -> Tensor:
        """Of each predicted token, (B, length); moves the hidden state on."""
        tokens = batch["tokens"]
        features, hidden = self.gru(self.embed(tokens[:, :-1]), self.hidden.read(draws))
        self.hidden.write(draws, hidden)
        return F.cross_entropy(self.last(features).transpose(1, 2), tokens[:, 1:], reduction="none")

    def loss(self, batch: Batch, draws: Draws) -> tuple[Tensor, Scalars]:
        loss = self.nats(batch, draws).mean()
        return loss, {"nats": loss.detach()}

    def evaluator(self, scores: Callable[[], Scores]) -> Evaluator:
        return PerToken(self)

    @torch.no_grad()
    def samples(self, draws: Draws, label: int | None = None, truncation: float | None = None) -> str:
        """A line for each row, of the most likely letters after the first one."""
        tokens = draws.integers("first", len(self.data.vocabulary))[:, None]
        hidden = self.hidden.read(draws)
        for _ in range(self.data.length):
            features, hidden = self.gru(self.embed(tokens[:, -1:]), hidden)
            tokens = torch.cat([tokens, self.last(features[:, -1]).argmax(1, keepdim=True)], 1)
        self.hidden.write(draws, hidden)
        return "\n".join("".join(self.data.vocabulary[token] for token in row) for row in tokens.tolist())

    def inference(self) -> nn.Module:
        return self


class PerToken:
    headline, maximise = "nats", False

    def __init__(self, workload: TinyRnn) -> None:
        self.workload = workload

    def totals(self, batch: Batch, draws: Draws) -> Totals:
        nats = self.workload.nats(batch, draws).double()
        return {"nats": nats.sum(), "tokens": nats.new_tensor(nats.numel())}

    def report(self, totals: Totals) -> dict[str, float]:
        return {"nats": float(totals["nats"] / totals["tokens"])}
