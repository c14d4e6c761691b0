"""Cheaper updates: what a hospital sends is its change, in fewer bytes; what was lost is sent later (error feedback).

Only the way up is compressed. The server adds what arrives to the student that it sent.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fedkd_utils.networks import State
from fedkd_utils.settings import entry_named


@dataclass(frozen=True)
class Codec:
    """A way to write a change in fewer bytes, and to read it again."""

    title: str
    encode: Callable[[State], State]  # change of the floating tensors -> packet, the tensors that travel
    decode: Callable[[State, Mapping[str, Tensor]], State]  # (packet, tensors of the same shapes) -> change
    feedback: bool = True  # what was lost is kept and added to the next change


def to_half(change: State) -> State:
    """Two bytes a number: IEEE half precision, 11 bits of mantissa."""
    return {name: tensor.half() for name, tensor in change.items()}


def from_half(packet: State, like: Mapping[str, Tensor]) -> State:
    """The numbers of :func:`to_half`."""
    return {name: packet[name].to(tensor.dtype) for name, tensor in like.items()}


def to_int8(change: State) -> State:
    """One byte a number, and a scale for each tensor: round(127 x / max |x|)."""
    packet: State = {}
    for name, tensor in change.items():
        scale = (tensor.abs().max() / 127).float()
        packet[name] = (
            (tensor / scale).round().to(torch.int8) if scale > 0 else torch.zeros_like(tensor, dtype=torch.int8)
        )
        packet[f"{name}/scale"] = scale
    return packet


def from_int8(packet: State, like: Mapping[str, Tensor]) -> State:
    """The numbers of :func:`to_int8`: scale times integer."""
    return {name: packet[name].to(tensor.dtype) * packet[f"{name}/scale"] for name, tensor in like.items()}


def to_largest(change: State, share: float) -> State:
    """Eight bytes for each of the largest numbers, by size, of all tensors together: where it stands, and its value.

    Args:
        share: of the numbers that travel; at least one does.
    """
    flat = torch.cat([change[name].flatten() for name in sorted(change)])
    where = flat.abs().topk(max(int(share * len(flat)), 1)).indices
    return {"index": where.to(torch.int32), "value": flat[where]}


def from_largest(packet: State, like: Mapping[str, Tensor]) -> State:
    """The numbers of :func:`to_largest`; all others are zero."""
    names = sorted(like)
    flat = torch.zeros(sum(like[name].numel() for name in names), dtype=packet["value"].dtype)
    flat[packet["index"].long()] = packet["value"]
    parts = flat.split([like[name].numel() for name in names])
    return {name: part.view_as(like[name]).to(like[name].dtype) for name, part in zip(names, parts, strict=True)}


#: The codecs by the name that ``Settings.compression`` gives.
CODECS: dict[str, Codec] = {
    "half": Codec("half precision", to_half, from_half),
    "int8": Codec("8 bits", to_int8, from_int8),
    "top_10": Codec("largest 10 %", lambda change: to_largest(change, 0.10), from_largest),
    "top_1": Codec("largest 1 %", lambda change: to_largest(change, 0.01), from_largest),
    "top_1_forgetful": Codec(
        "largest 1 %, rest forgotten", lambda change: to_largest(change, 0.01), from_largest, feedback=False
    ),
}


def codec_named(name: str) -> Codec:
    """A codec.

    Raises:
        ValueError: there is none of this name.
    """
    return entry_named(CODECS, name, "compression")


def compress(
    state: Mapping[str, Tensor], received: Mapping[str, Tensor], missing: Mapping[str, Tensor], codec: Codec
) -> tuple[State, State, State]:
    """What travels, what the server makes of it, and what is still to be sent.

    Error feedback (Seide et al., Interspeech 2014, doi:10.21437/Interspeech.2014-274; Karimireddy et al., ICML 2019,
    arXiv 1901.09847): the change to send is theta_k - theta + e_k, and e_k becomes what the packet lost of it. So the
    sum of all that arrived and what is still missing is the sum of all changes. Integer tensors travel as they are.

    Args:
        state: theta_k, the student after local training.
        received: theta, the student as the server sent it; more tensors than ``state`` do no harm.
        missing: e_k of the last round, empty in the first.

    Returns:
        The packet; the student that the server gets; e_k for the next round, empty without feedback.
    """
    floats = {name: tensor for name, tensor in state.items() if tensor.is_floating_point()}
    wanted = {name: tensor - received[name] + missing.get(name, 0.0) for name, tensor in floats.items()}
    packet = codec.encode(wanted)
    arrived = codec.decode(packet, wanted)
    whole = {name: tensor for name, tensor in state.items() if name not in floats}
    seen = {name: received[name] + arrived[name] if name in floats else tensor for name, tensor in state.items()}
    lost = {name: wanted[name] - arrived[name] for name in floats} if codec.feedback else {}
    return {**packet, **whole}, seen, lost
