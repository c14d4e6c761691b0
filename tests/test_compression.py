"""Cheaper updates: every codec against its closed form, what arrives plus what is missing, and the ledger."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_federation import SITES, TEACHER, TINY, Killed, equal, run, same, undisturbed

from fedkd_utils import clients, compression, networks
from fedkd_utils.clients import FederationError
from fedkd_utils.compression import CODECS
from fedkd_utils.methods import ROWS
from fedkd_utils.networks import CheckpointError, State, nbytes

SHAPES = {"z.weight": (3, 5, 2), "a.bias": (7,), "scalar": ()}


def drawn(seed: int, size: float = 1.0) -> State:
    generator = torch.Generator().manual_seed(seed)
    return {name: size * torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def arrived(name: str, change: State) -> State:
    return CODECS[name].decode(CODECS[name].encode(change), change)


# --- codecs -----------------------------------------------------------------------------------------------------


def test_half_precision_is_near_by_one_part_in_two_thousand() -> None:
    change = drawn(1)
    for name, tensor in arrived("half", change).items():
        assert torch.allclose(tensor, change[name], rtol=2**-11, atol=2**-25) and tensor.dtype == torch.float32
    exact = {"w": torch.tensor([0.5, -3.0, 1024.0])}
    assert equal(arrived("half", exact), exact)


def test_eight_bits_are_off_by_half_a_step_of_each_tensor() -> None:
    change = {**drawn(2), "small": 1e-6 * drawn(3)["a.bias"]}  # a tensor of small numbers keeps its own scale
    for name, tensor in arrived("int8", change).items():
        step = change[name].abs().max() / 127
        assert (tensor - change[name]).abs().max() <= step * 0.5001
    grid = {"w": torch.arange(-127, 128) * 0.25}
    assert torch.allclose(arrived("int8", grid)["w"], grid["w"], rtol=1e-6)
    assert equal(arrived("int8", {"w": torch.zeros(4)}), {"w": torch.zeros(4)})


def test_the_largest_numbers_arrive_exactly_and_nothing_else_does() -> None:
    change = drawn(4)
    flat = torch.cat([change[name].flatten() for name in change])  # 38 numbers
    threshold = sorted(flat.abs().tolist())[-3]  # brute force: the three largest
    for name, tensor in arrived("top_10", change).items():
        assert torch.equal(tensor, torch.where(change[name].abs() >= threshold, change[name], 0.0))
    assert sum(int((t != 0).sum()) for t in arrived("top_1", change).values()) == 1  # at least one travels


@pytest.mark.parametrize(
    ("name", "size"),
    [("half", 2 * 38), ("int8", 38 + 3 * 4), ("top_10", 3 * 8), ("top_1", 8), ("top_1_forgetful", 8)],
)
def test_a_packet_has_the_bytes_of_its_closed_form(name: str, size: int) -> None:
    assert nbytes(CODECS[name].encode(drawn(5))) == size


# --- error feedback ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CODECS)
def test_what_arrived_and_what_is_missing_is_all_that_was_sent(name: str) -> None:
    """Over rounds in which the server moves on by what it got: the sum of the changes is kept, or lost for ever."""
    server, missing, sent = drawn(0), {}, {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    begin = server
    for number in range(1, 30):
        change = drawn(number, 0.1)
        trained = {n: server[n] + change[n] for n in SHAPES}
        _, server, missing = compression.compress(trained, server, missing, CODECS[name])
        sent = {n: sent[n] + change[n] for n in SHAPES}
    if CODECS[name].feedback:
        for n in SHAPES:
            assert torch.allclose(server[n] + missing[n], begin[n] + sent[n], atol=1e-5)
    else:
        assert not missing
        assert max(float((server[n] - begin[n] - sent[n]).abs().max()) for n in SHAPES) > 0.1


def test_integers_travel_as_they_are_and_a_round_trip_changes_no_argument() -> None:
    received = {**drawn(6), "count": torch.tensor(3)}
    trained = {**drawn(7), "count": torch.tensor(8)}
    before = {name: tensor.clone() for name, tensor in {**received, **trained}.items()}
    packet, seen, missing = compression.compress(trained, received, {}, CODECS["int8"])
    assert packet["count"].item() == seen["count"].item() == 8 and "count" not in missing
    assert equal({**received, **trained}, before)


# --- in the federation ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CODECS)
def test_the_ledger_counts_the_packets(name: str) -> None:
    result = run("fedavg", settings=replace(TINY, compression=name))
    model = TEACHER.state_dict()
    numbers = sum(tensor.numel() for tensor in model.values())
    size = {
        "half": 2 * numbers,
        "int8": numbers + 4 * len(model),
        "top_10": 8 * int(0.10 * numbers),
    }.get(name, 8 * max(int(0.01 * numbers), 1))
    assert result.ledger.total("up") == TINY.rounds * len(SITES) * size
    assert result.ledger.total("down") == undisturbed("fedavg").ledger.total("down")


def test_rounding_moves_the_loss_less_than_leaving_out() -> None:
    plain = undisturbed("fedavg").history["loss"].to_numpy()
    off = {n: abs(run("fedavg", settings=replace(TINY, compression=n)).history["loss"] - plain).max() for n in CODECS}
    assert max(off["half"], off["int8"]) < off["top_1"] / 5


def test_a_codec_that_loses_nothing_moves_no_digit(monkeypatch: pytest.MonkeyPatch) -> None:
    exact = compression.Codec("none", lambda change: change, lambda packet, like: {n: packet[n] for n in like})
    monkeypatch.setitem(CODECS, "exact", exact)
    result, plain = run("dual_kd", settings=replace(TINY, compression="exact")), undisturbed("dual_kd")
    assert result.ledger.total("up") == plain.ledger.total("up")
    assert abs(result.history["loss"].to_numpy() - plain.history["loss"].to_numpy()).max() < 1e-4


@pytest.mark.parametrize("row", ["dual_kd", "fedbn", "uamt"])
def test_a_killed_run_remembers_what_is_missing(row: str, tmp_path: Path) -> None:
    settings = replace(TINY, compression="top_1")
    steps = 0

    def kill(n: int, note: str) -> None:
        nonlocal steps
        steps += n
        if steps > (11 if ROWS[row].distils else 0) + 15:
            raise Killed

    with pytest.raises(Killed):
        run(row, settings=settings, folder=tmp_path, progress=kill)
    assert same(run(row, settings=settings, folder=tmp_path), run(row, settings=settings))
    with pytest.raises(FederationError, match="belongs to a run with other"):
        run(row, settings=replace(settings, compression="int8"), folder=tmp_path)


def test_nan_does_not_hide_in_eight_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    start = networks.copy_state(networks.build_network(TINY, 0))
    real = clients.copy_state

    def broken(network: torch.nn.Module) -> State:
        state = real(network)
        next(iter(state.values())).view(-1)[0] = float("nan")
        return state

    monkeypatch.setattr(clients, "copy_state", broken)
    with pytest.raises(CheckpointError, match="The update of client south: .* holds NaN"):
        clients.client_update(start, SITES[0], ROWS["fedavg"], replace(TINY, compression="int8"), 1, 0)


def test_what_cannot_be_compressed_says_so() -> None:
    with pytest.raises(ValueError, match="no compression 'zip': choose one of half, int8"):
        run("fedavg", settings=replace(TINY, compression="zip"))
    with pytest.raises(FederationError, match="'Local only' sends no update"):
        run("local_only", settings=replace(TINY, compression="half"))
