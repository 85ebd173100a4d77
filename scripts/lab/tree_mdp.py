"""The token MDP of From r to Q*, arXiv 2404.12358, with so few tokens that all its trajectories can be enumerated.

A state is the sequence of tokens so far, an action the next token. A trajectory ends with the EOS, or at the horizon.
Rewards, log-probs and Q are tables with an entry for each state and action, (..., S, A), values V are (..., S).
"""

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

State = tuple[int, ...]


class Solution(NamedTuple):
    """The optimum of E[Σ r] - β KL(π ‖ π_ref)."""

    q: Tensor  # Q*, (..., S, A)
    v: Tensor  # V*, (..., S)
    logps: Tensor  # log π*, (..., S, A)


class TreeMDP:
    """The states and trajectories of `num_tokens` tokens, of at most `horizon` actions."""

    def __init__(self, num_tokens: int, horizon: int, eos: int | None = None) -> None:
        self.num_tokens = num_tokens
        self.horizon = horizon
        self.eos = eos

        self.states: list[State] = []  # from short to long
        self.paths: list[State] = []
        self.row_of: dict[State, int] = {}
        for sequence in self._all_sequences():
            if not self.is_terminal(sequence):
                self.row_of[sequence] = len(self.states)
                self.states.append(sequence)
            elif sequence[:-1] in self.row_of:
                self.paths.append(sequence)

        next_rows = []
        for state, action in self.choices():
            next_state = (*state, action)
            next_rows.append(self.row_of.get(next_state, len(self.states)))
        self.next_rows = torch.tensor(next_rows).view(self.shape)  # (S, A), S where the next state is terminal

        visits = [self._visits_of(path) for path in self.paths]
        self.visits = torch.stack(visits)  # (paths, S * A), 0 or 1

    @property
    def shape(self) -> tuple[int, int]:
        """Of a table: states, actions."""
        return len(self.states), self.num_tokens

    def _all_sequences(self) -> Iterator[State]:
        for length in range(self.horizon + 1):
            yield from itertools.product(range(self.num_tokens), repeat=length)

    def _visits_of(self, path: State) -> Tensor:
        visits = torch.zeros(self.shape, dtype=torch.float64)
        for t, action in enumerate(path):
            visits[self.row_of[path[:t]], action] = 1
        return visits.flatten()

    def is_terminal(self, sequence: State) -> bool:
        """After the EOS, or after the last action."""
        return len(sequence) == self.horizon or self.eos in sequence

    def choices(self) -> Iterator[tuple[State, int]]:
        """Each state with each of its actions, in the order of a flat table."""
        yield from itertools.product(self.states, range(self.num_tokens))

    # ------------------------------------------------------------ along trajectories

    def along(self, table: Tensor, *paths: State) -> Tensor:
        """The entries of a table (S, A) on the way along paths, one path after another: (tokens,)."""
        rows = []
        actions = []
        for path in paths:
            for t, action in enumerate(path):
                rows.append(self.row_of[path[:t]])
                actions.append(action)
        return table[rows, actions]

    def sums(self, table: Tensor) -> Tensor:
        """The sum of a table along each trajectory, (..., S, A) → (..., paths)."""
        return table.flatten(-2) @ self.visits.T

    def at_the_end(self, returns: Tensor) -> Tensor:
        """The sparse rewards of given returns: all at the last action, (paths,) → (S, A)."""
        rewards = torch.zeros(self.shape, dtype=torch.float64)
        for path, reward in zip(self.paths, returns.tolist(), strict=True):
            row = self.row_of[path[:-1]]
            rewards[row, path[-1]] = reward
        return rewards

    def policy_of(self, path_logps: Tensor) -> Tensor:
        """The log-probs (S, A) of the policy that draws trajectories with the log-probs (paths,)."""
        masses = path_logps.exp() @ self.visits
        return masses.view(self.shape).log().log_softmax(-1)

    # ------------------------------------------------------------ Bellman's equation

    def next_values(self, values: Tensor, terminal: float = 0.0) -> Tensor:
        """The value of the next state, which is `terminal` where the trajectory ends: (..., S) → (..., S, A)."""
        at_the_end = torch.full_like(values[..., :1], terminal)
        padded = torch.cat([values, at_the_end], -1)
        return padded[..., self.next_rows]

    def solve(self, rewards: Tensor, ref_logps: Tensor, beta: float) -> Solution:
        """Eqs 5 to 7 from the last states backwards."""
        q = rewards + beta * ref_logps
        v = torch.zeros_like(q[..., 0])
        for row in reversed(range(len(self.states))):
            next_values = self.next_values(v)
            q[..., row, :] += next_values[..., row, :]
            scaled = q[..., row, :] / beta
            v[..., row] = beta * scaled.logsumexp(-1)
        return Solution(q, v, (q - v.unsqueeze(-1)) / beta)

    def inverse(self, q: Tensor, ref_logps: Tensor, beta: float) -> Tensor:
        """The rewards whose Q* is q: Eq 7 with the V* of Eq 6, solved for r."""
        v = beta * (q / beta).logsumexp(-1)
        return q - beta * ref_logps - self.next_values(v)

    def shaped(self, rewards: Tensor, potential: Tensor, terminal: float = 0.0) -> Tensor:
        """Definition 1, r + Φ(s') - Φ(s), for a potential (..., S) that is `terminal` at terminal states."""
        return rewards + self.next_values(potential, terminal) - potential.unsqueeze(-1)
