"""What a curious server can learn from updates, and what stops it: masks that cancel, and noise that is accounted for.

A model of the protocols, to be read and tested; in a real federation the keys come from a key exchange and the masks
from a cryptographic generator (Bonawitz et al., CCS 2017, doi:10.1145/3133956.3133982).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from opacus.accountants import RDPAccountant
from scipy.stats import mannwhitneyu
from torch import Tensor, nn

from fedkd_utils.losses import supervised_loss
from fedkd_utils.seeds import generator_of, seed_of
from fedkd_utils.training import evaluating

# --------------------------------------------------------------------------------------------------- membership attack


def case_losses(network: nn.Module, images: Tensor, labels: Tensor) -> NDArray[np.float64]:
    """The supervised loss of each volume by itself, without dropout: (N, 1, D, H, W), (N, D, H, W) -> (N,)."""
    with evaluating(network):
        pairs = zip(images, labels, strict=True)
        return np.array([float(supervised_loss(network(x[None]), y[None])) for x, y in pairs])


def auc(members: ArrayLike, others: ArrayLike) -> float:
    """How often a member scores higher than another, ties counting half: 0.5 is guessing, 1 is certainty.

    It is the area under the ROC curve, and Mann and Whitney's U over the number of pairs.

    Raises:
        ValueError: nobody on one side.
    """
    members, others = np.asarray(members, float), np.asarray(others, float)
    if not members.size or not others.size:
        raise ValueError("An AUC needs at least one member and one other.")
    return float(mannwhitneyu(members, others).statistic / (members.size * others.size))


# -------------------------------------------------------------------------------------------------- secure aggregation

#: Masked numbers are integers modulo 2^32; 20 bits lie behind the point, so a sum must stay within +-2048.
MODULUS, FRACTION = 2**32, 2**20


def to_fixed(values: Tensor, parties: int) -> Tensor:
    """Real numbers as integers modulo 2^32, rounded to steps of 2^-20: any shape -> the same, int64 in [0, 2^32).

    Raises:
        ValueError: NaN, or numbers so large that a sum over ``parties`` of them could wrap round.
    """
    largest = (MODULUS // 2 - parties) / (FRACTION * parties)
    if not bool((values.abs() <= largest).all()):  # NaN is not <= anything
        raise ValueError(f"A masked number must lie within +-{largest:.6g} for {parties} parties, and not be NaN.")
    return (values.double() * FRACTION).round().long() % MODULUS


def from_fixed(numbers: Tensor) -> Tensor:
    """The real numbers (float64) behind integers of :func:`to_fixed`, or behind their sum."""
    numbers = numbers % MODULUS
    return torch.where(numbers >= MODULUS // 2, numbers - MODULUS, numbers).double() / FRACTION


def pair_seeds(clients: Sequence[str], seed: int, round_number: int) -> dict[str, dict[str, int]]:
    """A secret for each pair of clients and round: ``pair_seeds(...)["a"]["b"]`` is what a and b share.

    Here from a seed; in truth from a key exchange through the server, which learns none of them.
    """
    return {a: {b: seed_of(seed, "pair", round_number, *sorted((a, b))) for b in clients if b != a} for a in clients}


def mask_of(client: str, shared: Mapping[str, int], size: int) -> Tensor:
    """The mask of a client, (size,) int64 in [0, 2^32): of each pair, the first by name adds and the other subtracts.

    Args:
        shared: the secret of this client with each of the others.
    """
    mask = torch.zeros(size, dtype=torch.int64)
    for other, secret in shared.items():
        drawn = torch.randint(MODULUS, (size,), generator=generator_of(secret), dtype=torch.int64)
        mask += drawn if client < other else -drawn
    return mask % MODULUS


def unmasked_sum(messages: Mapping[str, Tensor], dropped: Mapping[str, Mapping[str, int]] | None = None) -> Tensor:
    """The sum of what was masked, float64; of all clients, or of those that answered.

    Args:
        messages: by client, ``(to_fixed(x) + mask_of(client, ...)) % MODULUS``, (P,) int64.
        dropped: for every client that masked with the others but sent nothing, the secrets that those who did send
            share with it; they hand them over, and without them the sum is noise.
    """
    total = torch.stack(list(messages.values())).sum(dim=0)
    for client, shared in (dropped or {}).items():
        total += mask_of(client, shared, len(total))  # what the others had added against it
    return from_fixed(total)


# ------------------------------------------------------------------------------------------------ differential privacy

#: Orders of Renyi divergence among which the accountant chooses: near 1 for next to no noise, large for much of it.
ORDERS = [*(1 + np.logspace(-4, 1, 1000)).tolist(), *range(12, 64), *(2**k for k in range(6, 17))]


def epsilon(noise_multiplier: float, rounds: int, delta: float, sample_rate: float = 1.0) -> float:
    """The epsilon of (epsilon, delta) differential privacy at the level of clients, by Opacus's accountant.

    The sum of clipped changes gets noise of deviation z S (:func:`server.private_step`); two federations are
    neighbours when one has one client more. Renyi accounting (Mironov, CSF 2017, arXiv 1702.07476; with sampling,
    Mironov et al., arXiv 1908.10530), an upper bound.

    Args:
        noise_multiplier: z.
        delta: the slack of the promise, for every set of outcomes; far below one over the number of clients.
        sample_rate: the probability with which a client takes part in a round; with few hospitals 1.

    Raises:
        ValueError: a number out of range.
    """
    if noise_multiplier <= 0 or rounds < 1 or not 0 < delta < 1 or not 0 < sample_rate <= 1:
        raise ValueError(
            "epsilon needs noise_multiplier > 0, rounds >= 1, 0 < delta < 1 and 0 < sample_rate <= 1, not "
            f"{noise_multiplier}, {rounds}, {delta}, {sample_rate}."
        )
    accountant = RDPAccountant()
    accountant.history = [(noise_multiplier, sample_rate, rounds)]
    return float(accountant.get_epsilon(delta=delta, alphas=ORDERS))
