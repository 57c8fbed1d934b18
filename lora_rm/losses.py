"""Losses of preferences: pure functions of rewards.

Every function gives one loss a preference. A step's loss is their sum over the step's number of preferences,
so how the step is cut into microbatches, and how many answers each preference has, changes nothing.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F

from lora_rm.config import LossSettings


class Target(Protocol):
    """What a loss must know of a preference; `TokenTree` has it."""

    @property
    def kind(self) -> str: ...  # noqa: D102
    @property
    def answer_ids(self) -> Sequence[Sequence[int]]: ...  # noqa: D102
    @property
    def probability(self) -> float: ...  # noqa: D102
    @property
    def margin(self) -> float: ...  # noqa: D102
    @property
    def scores(self) -> Sequence[float]: ...  # noqa: D102


def preference_losses(
    rewards: torch.Tensor, preferences: Sequence[Target], settings: LossSettings
) -> torch.Tensor:
    """Losses of N preferences with R answers in all.

    Args:
        rewards: The answers' rewards one preference after another, (R,) float32.
        preferences: The N targets.
        settings: Which formula, and its numbers.

    Returns:
        One loss a preference, (N,), with gradient.
    """
    losses: list[torch.Tensor] = [rewards.new_zeros(())] * len(preferences)
    pairs: list[int] = []
    starts: list[int] = []
    start = 0
    for number, preference in enumerate(preferences):
        own = rewards[start : start + len(preference.answer_ids)]
        if preference.kind == "pair":
            pairs.append(number)
            starts.append(start)
        elif preference.kind == "ranking":
            losses[number] = plackett_luce(own, own.new_tensor(preference.scores))
        else:
            losses[number] = regression(own, own.new_tensor(preference.scores)).mean()
        if settings.centering and preference.kind != "rating":
            losses[number] = losses[number] + settings.centering * centering(own)
        start += len(preference.answer_ids)
    if pairs:
        first = torch.tensor(starts, device=rewards.device)
        probability = rewards.new_tensor([preferences[number].probability for number in pairs])
        margin = rewards.new_tensor([preferences[number].margin for number in pairs])
        difference = rewards[first] - rewards[first + 1]
        if settings.use_margin:
            difference = difference - margin
        of_pairs = pair_losses(difference, probability, settings)
        for position, number in enumerate(pairs):
            losses[number] = losses[number] + of_pairs[position]
    return torch.stack(losses)


def pair_losses(difference: torch.Tensor, probability: torch.Tensor, settings: LossSettings) -> torch.Tensor:
    """Losses of P pairs by the model of `settings.pair`, (P,).

    Args:
        difference: Reward of the preferred answer minus that of the other, less the margin, (P,).
        probability: That the preferred one is the better, from 0.5 (a tie) to 1, (P,).
        settings: Model of a pair, label smoothing and the strength of ties.
    """
    smoothing = settings.label_smoothing
    label = probability * (1 - smoothing) + (1 - probability) * smoothing
    if settings.pair == "bradley_terry":
        return bradley_terry(difference, label)
    outcomes = rao_kupper if settings.pair == "rao_kupper" else davidson
    wins, losses, ties = outcomes(difference, settings.tie_strength)
    decided = -(label * wins + (1 - label) * losses)
    return torch.where(probability == 0.5, -ties, decided)


def bradley_terry(difference: torch.Tensor, probability: torch.Tensor) -> torch.Tensor:
    """-p log sigmoid(d) - (1 - p) log sigmoid(-d), (P,).

    With p = 1 the loss of every reward model since Ouyang et al. 2022 (arXiv 2203.02155, eq. 1); with p = 0.5
    a tie, whose best difference is zero.

    Args:
        difference: Reward of the first answer minus that of the second, (P,).
        probability: That the first one is the better, (P,).

    Source: Bradley and Terry 1952.
    """
    return -probability * F.logsigmoid(difference) - (1 - probability) * F.logsigmoid(-difference)


def rao_kupper(difference: torch.Tensor, strength: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log-probabilities of win, loss and tie: P(win) = sigmoid(d - log eta), eta = 1 + strength; each (P,).

    P(tie) = (eta^2 - 1) P(win) P(loss).

    Source: Rao and Kupper 1967, eq. 2.3 to 2.5.
    """
    eta = 1.0 + strength
    log_eta = torch.log(difference.new_tensor(eta))
    wins, losses = F.logsigmoid(difference - log_eta), F.logsigmoid(-difference - log_eta)
    return wins, losses, torch.log(difference.new_tensor(eta * eta - 1.0)) + wins + losses


def davidson(difference: torch.Tensor, strength: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log-probabilities of win, loss and tie; P(tie) = nu sqrt(P(win) P(loss)), nu = strength; each (P,).

    Source: Davidson 1970, eq. 2.6.
    """
    log_nu = torch.log(difference.new_tensor(strength)).expand_as(difference)
    parts = torch.stack((difference / 2, -difference / 2, log_nu))
    wins, losses, ties = torch.log_softmax(parts, dim=0)
    return wins, losses, ties


def plackett_luce(rewards: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """Mean over the ranks of -log P(this answer is the best of those not yet placed), a scalar.

    Equal scores are ties, handled as Breslow 1974 does: each tied answer competes with all that are not
    better. The worst group adds nothing. With two answers it is Bradley-Terry.

    Args:
        rewards: Of one preference's answers, (K,).
        scores: Higher is better, (K,).

    Source: Plackett 1975; as a loss, Xia et al. 2008 (ListMLE), eq. 6.
    """
    not_better = scores[None, :] <= scores[:, None]
    remaining = rewards[None, :].expand(len(rewards), -1).masked_fill(~not_better, float("-inf"))
    stage = torch.logsumexp(remaining, dim=1) - rewards
    placed = scores > scores.min()  # none if all are tied: then there is nothing to learn
    return stage[placed].sum() / placed.sum().clamp_min(1)


def regression(rewards: torch.Tensor, ratings: torch.Tensor) -> torch.Tensor:
    """Squared differences to the ratings, (K,)."""
    return (rewards - ratings) ** 2


def centering(rewards: torch.Tensor) -> torch.Tensor:
    """Square of twice the mean reward of one prompt's answers, a scalar; (r1 + r2)^2 of a pair.

    Rewards are only fixed up to a constant a prompt; this pulls it to zero.

    Source: Eisenstein et al. 2023 (arXiv 2312.09244), section 2.
    """
    return (2 * rewards.mean()) ** 2
