"""The numbers of the log: what preference algorithms log, and means over micro-batches, processes and steps."""

from collections import Counter

import torch
from torch import Tensor

from shared.distributed import Ranks, all_sum

Totals = dict[str, tuple[float, float]]  # metric → its sum and the number of values in it


def preference_metrics(rewards: Tensor, logps: Tensor | None = None) -> dict[str, Tensor]:
    """What every preference algorithm logs for each group. rewards, logps (B, K), preferred first → (B,) each.

    "Chosen" is column 0, and "rejected" is the mean of the other columns. A tie counts as wrong.
    """
    metrics = _chosen_and_rejected("rewards", rewards)
    if logps is not None:
        metrics |= _chosen_and_rejected("logps", logps)

    margins = metrics["rewards/chosen"] - metrics["rewards/rejected"]
    metrics["rewards/margins"] = margins
    metrics["rewards/accuracies"] = (margins > 0).float()
    return metrics


def _chosen_and_rejected(name: str, values: Tensor) -> dict[str, Tensor]:
    return {f"{name}/chosen": values[:, 0], f"{name}/rejected": values[:, 1:].mean(1)}


class Meter:
    """Sums up losses and metrics for the log."""

    def __init__(self, ranks: Ranks):
        self.ranks = ranks
        # of this process, since `reduce` was called last; on the device, so that adding does not wait for it
        self._sums: dict[str, list[Tensor]] = {}
        self._counts: Counter[str] = Counter()
        self.loss_sums: list[Tensor] = []  # of each micro-batch of this process, at the last call of `reduce`

    def add(self, losses: Tensor, metrics: dict[str, Tensor]) -> None:
        """Add the losses (B,) and metrics (B,) of one micro-batch, without waiting for the device."""
        for name, values in {"loss": losses, **metrics}.items():
            total = values.detach().double().sum()
            self._sums.setdefault(name, []).append(total)
            self._counts[name] += values.numel()

    def reduce(self, stop_asked: bool) -> tuple[Totals, bool]:
        """Sum the added values over all processes, and reset.

        Returns the totals, and whether any process was asked to stop. One collective carries both.
        """
        names = list(self._sums)
        sums = [torch.stack(self._sums[name]).sum() for name in names]
        sums.append(torch.tensor(stop_asked, dtype=torch.double, device=self.ranks.device))
        counts = [self._counts[name] for name in names] + [0]
        self.loss_sums = self._sums["loss"]
        self._sums = {}
        self._counts = Counter()

        local = torch.stack(sums)
        exchanged = torch.stack([local, local.new_tensor(counts)])
        global_sums, global_counts = all_sum(exchanged).tolist()

        stop = global_sums.pop() > 0
        totals = {}
        for name, total, count in zip(names, global_sums, global_counts, strict=False):
            totals[name] = (total, count)
        return totals, stop


def add_totals(totals: Totals, more: Totals) -> Totals:
    """The sums and counts of two sets of totals together."""
    together = dict(totals)
    for name, (total, count) in more.items():
        previous_total, previous_count = totals.get(name, (0.0, 0.0))
        together[name] = (previous_total + total, previous_count + count)
    return together


def means(totals: Totals) -> dict[str, float]:
    """The mean of each metric."""
    return {name: total / count for name, (total, count) in totals.items()}
