"""LSTMLayer: the recurrence h_t = LSTM(h_{t-1}, x_t), with resets anywhere in a sequence; `sequence.recurrent_input` makes x_t.

The input half of the gates is one GEMM over all frames; the loop holds only the recurrent half. Source: Hochreiter and
Schmidhuber 1997; forget bias 1 from Jozefowicz et al. 2015; orthogonal recurrent weights from Saxe et al., arXiv 1312.6120.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from aime_fast.layers import full_precision


class LSTMLayer(nn.Module):
    """`num_layers` LSTM layers with layer norm on the output.

    Args:
        input_dim: 2 Z + Dc + A, see `sequence.recurrent_input`.
        hidden_dim: Dh.
    """

    def __init__(self, input_dim: int, hidden_dim: int, num_layers: int = 1):
        super().__init__()
        self.hidden_dim, self.num_layers = hidden_dim, num_layers
        widths = [input_dim] + [hidden_dim] * (num_layers - 1)
        self.input_gates = nn.ModuleList(nn.Linear(width, 4 * hidden_dim) for width in widths)
        self.recurrent = nn.ParameterList(torch.empty(4 * hidden_dim, hidden_dim) for _ in widths)
        self.norm = nn.LayerNorm(hidden_dim)
        for linear, weight in zip(self.input_gates, self.recurrent):
            nn.init.zeros_(linear.bias)
            with torch.no_grad():
                linear.bias[hidden_dim : 2 * hidden_dim] = 1.0  # forget gate
                for gate in weight.chunk(4):
                    nn.init.orthogonal_(gate)

    def initial_state(self, batch: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Zeros [B, layers, 2, Dh]: hidden and cell of each layer."""
        return torch.zeros(batch, self.num_layers, 2, self.hidden_dim, device=device, dtype=dtype)

    def forward(self, x: Tensor, start: Tensor | None, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Runs a sequence.

        Args:
            x: [B, T, input_dim].
            start: bool [B, T]; the state is zero before these frames. None: before none of them.
            state: [B, layers, 2, Dh] before the first frame; zeros by default.

        Returns:
            (output [B, T, Dh] after layer norm, states [B, T, layers, 2, Dh] after each frame).
        """
        # A frame's [B, 1], 0 where the state restarts
        carry = [None] * x.shape[1] if start is None else (~start).to(x.dtype).unsqueeze(-1).unbind(1)
        if state is None:
            state = self.initial_state(x.shape[0], x.device, full_precision(x).dtype)
        states = []
        for layer, (linear, weight) in enumerate(zip(self.input_gates, self.recurrent)):
            from_input = full_precision(linear(x))  # [B, T, 4 Dh]
            hidden, cell = state[:, layer].unbind(1)
            outputs, cells = [], []
            # unbind: the backward of indexing [:, t] would fill a gradient of all frames for each t
            for gates_from_input, carried in zip(from_input.unbind(1), carry):
                if carried is not None:
                    hidden, cell = hidden * carried, cell * carried
                hidden, cell = lstm_cell(gates_from_input, full_precision(hidden @ weight.T), cell)
                outputs.append(hidden)
                cells.append(cell)
            x = torch.stack(outputs, dim=1)
            states.append(torch.stack([x, torch.stack(cells, dim=1)], dim=2))  # [B, T, 2, Dh]
        return self.norm(x), torch.stack(states, dim=2)


def lstm_cell(from_input: Tensor, from_hidden: Tensor, cell: Tensor) -> tuple[Tensor, Tensor]:
    """The gates' two halves [B, 4 Dh] (input, forget, candidate, output) and the old cell [B, Dh] -> (hidden, cell), both [B, Dh].

    On a GPU eager code calls PyTorch's fused cell, one kernel forward and one backward instead of some 40; it cannot be traced.
    """
    if from_input.is_cuda and not torch.compiler.is_compiling():
        return torch.ops.aten._thnn_fused_lstm_cell(from_input, from_hidden, cell)[:2]
    input_gate, forget_gate, candidate, output_gate = (from_input + from_hidden).chunk(4, dim=-1)
    cell = forget_gate.sigmoid() * cell + input_gate.sigmoid() * candidate.tanh()
    return output_gate.sigmoid() * cell.tanh(), cell
