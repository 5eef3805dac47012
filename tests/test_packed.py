"""Packed sequences: exported padded beside their lengths, equal in ONNX Runtime and in C, narrowed and trained."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import lilliput
from lilliput import ExportError, Task
from lilliput.engine.compile import compile
from lilliput.graph.stages import Narrow
from lilliput.onnx.trace import trace
from lilliput.task import predict
from lilliput.train import Train


class Reader(nn.Module):
    """Words, a recurrent layer over packed steps, and a Linear on its last states or the mean of its outputs."""

    def __init__(
        self, kind: type[nn.RNNBase], reads: str, layers: int = 1, both: bool = False, **settings: str
    ) -> None:
        super().__init__()
        self.reads, self.first = reads, reads != "steps first"
        self.words = nn.Embedding(50, 12)
        self.rnn = kind(12, 16, layers, batch_first=self.first, bidirectional=both, **settings)
        self.out = nn.Linear(32 if both else 16, 3)

    def forward(self, ids: Tensor, lengths: Tensor) -> Tensor:
        steps = self.words(ids if self.first else ids.t())
        packed = pack_padded_sequence(steps, lengths.cpu(), batch_first=self.first, enforce_sorted=False)
        outputs, state = self.rnn(packed)
        if self.reads == "cell":
            return self.out(state[1][-1])
        if self.reads == "state":
            state = state[0] if isinstance(state, tuple) else state
            return self.out(torch.cat([state[-2], state[-1]], -1) if self.rnn.bidirectional else state[-1])
        padded, counts = pad_packed_sequence(outputs, batch_first=self.first)
        return self.out(padded.sum(1 if self.first else 0) / counts[:, None])


IDS, LENGTHS = torch.arange(42).reshape(7, 6), torch.tensor([6, 3, 1, 5, 6, 2, 4])


@pytest.mark.parametrize(
    "build",
    [
        lambda: Reader(nn.LSTM, "state", both=True),
        lambda: Reader(nn.LSTM, "outputs", layers=2),
        lambda: Reader(nn.GRU, "outputs", layers=2, both=True),
        lambda: Reader(nn.GRU, "state"),
        lambda: Reader(nn.RNN, "steps first", nonlinearity="relu"),
    ],
    ids=["lstm", "deep lstm", "deep gru", "gru", "rnn"],
)
def test_artifacts_equal_the_model_for_every_length(build, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = build().eval()
    lilliput.save(model, (IDS[:1], LENGTHS[:1]), tmp_path)
    torch.testing.assert_close(lilliput.load(tmp_path)(IDS, LENGTHS), model(IDS, LENGTHS).detach())
    engine = compile(tmp_path / "model.onnx")
    for row in (1, 4):
        given = IDS[row : row + 1], LENGTHS[row : row + 1]
        got = torch.from_numpy(engine(*(part.numpy() for part in given)))
        torch.testing.assert_close(got, model(*given).detach())
    assert "forward" not in vars(model.rnn)


def test_they_are_narrowed_and_trained(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, y = Reader(nn.LSTM, "state", both=True).eval(), torch.arange(7) % 3
    task = Task("packed", train=((IDS, LENGTHS), y), val=((IDS, LENGTHS), y), batch_size=4)
    small = lilliput.run(model, task, (Narrow(0.5, multiple=1), Train(steps=3)))
    assert small.rnn.hidden_size == 8 and small.out.in_features == 16
    lilliput.save(small, task.example, tmp_path)
    torch.testing.assert_close(predict(lilliput.load(tmp_path), (IDS, LENGTHS)), predict(small, (IDS, LENGTHS)))


def test_the_last_cell_state_is_refused() -> None:
    """Outputs do not tell it: a file that had a wrong number there would be worse than none."""
    with pytest.raises(ExportError, match=r"last cell state of a packed sequence.*Read the hidden state"):
        trace(Reader(nn.LSTM, "cell").eval(), (IDS[:1], LENGTHS[:1]))
