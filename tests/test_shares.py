"""Who labels what: disjoint few for every seed, nested numbers of volumes, and nothing hidden leaks into training."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import TINY

from fedkd_utils import cohorts, shares, transforms
from fedkd_utils.errors import VolumeError
from fedkd_utils.site_folder import Item, Site

TEN = replace(TINY, client_labelled=2, client_unlabelled=8)


def names(items: tuple[Item, ...]) -> list[str]:
    return [item.name for item in items]


@pytest.fixture(scope="module")
def site(cache: Path) -> Site:
    return cohorts.make_cohort(TEN, "paper_like", root=cache).clients[0]


def shared(cache: Path, seed: int = 0, **sizes: int) -> Site:
    cohort = cohorts.make_cohort(TEN, "paper_like", root=cache)
    return shares.share(cohort, replace(TEN, **sizes), seed).clients[0]


def test_seed_0_takes_the_files_as_they_are(cache: Path, site: Site) -> None:
    assert shared(cache) == site


def test_five_seeds_label_five_disjoint_pairs_and_see_every_volume(cache: Path, site: Site) -> None:
    everything = {*names(site.training), *names(site.unlabelled)}
    pairs = []
    for seed in range(5):
        one = shared(cache, seed)
        pairs += names(one.training)
        assert {*names(one.training), *names(one.unlabelled)} == everything
        assert (one.validation, one.test) == (site.validation, site.test)
    assert sorted(pairs) == sorted(everything)
    assert shared(cache, 5) == shared(cache, 0)


def assert_labels_fit(data: transforms.SiteData) -> None:
    """The labelled boxes are bright: no other volume's label fits an image better than its own."""

    def fit(image: torch.Tensor, label: torch.Tensor) -> float:
        return float(image[0][label > 0].mean() - image[0][label == 0].mean())

    table = torch.tensor([[fit(image, label) for label in data.labels] for image in data.labelled_images])
    assert torch.equal(table.diagonal(), table.max(dim=1).values) and table.std() > 0.1


@pytest.mark.parametrize("seed", [0, 1, 4])
def test_labels_are_those_of_the_volumes_and_unlabelled_volumes_have_none(cache: Path, seed: int) -> None:
    one = shared(cache, seed)
    for item in one.training:
        assert item.label is not None and item.label.is_file() and item.label.name == item.image.name
    assert all(item.label is None for item in one.unlabelled)
    data = transforms.load_site(one, TEN)
    assert len(data.labelled_images) == 2 and len(data.unlabelled_images) == 8
    assert_labels_fit(data)


@pytest.mark.parametrize("seed", [0, 3])
def test_more_volumes_are_the_same_and_others(cache: Path, seed: int) -> None:
    labelled = [names(shared(cache, seed, client_labelled=n, client_unlabelled=2).training) for n in (1, 2, 4, 8)]
    assert all(set(a) < set(b) for a, b in zip(labelled[:-1], labelled[1:], strict=True))
    unlabelled = [names(shared(cache, seed, client_labelled=2, client_unlabelled=n).unlabelled) for n in (1, 4, 8)]
    assert all(set(a) < set(b) for a, b in zip(unlabelled[:-1], unlabelled[1:], strict=True))
    assert not set(labelled[-1]) & set(names(shared(cache, seed, client_labelled=8, client_unlabelled=2).unlabelled))


def test_too_many_volumes_are_refused(cache: Path) -> None:
    with pytest.raises(VolumeError, match="2 labelled and 8 unlabelled volumes, but the settings ask for 4"):
        shared(cache, client_labelled=4, client_unlabelled=8)


@pytest.mark.parametrize("seed", [0, 2])
def test_the_pool_holds_every_volume_once_with_its_own_label(cache: Path, seed: int) -> None:
    cohort = cohorts.make_cohort(TEN, "paper_like", root=cache)
    data = shares.pooled_site(shares.share(cohort, TEN, seed), TEN)
    assert len(data.labelled_images) == 2 * 10 and len(data.unlabelled_images) == 0
    assert_labels_fit(data)
    assert len({bytes(image.numpy().tobytes()) for image in data.labelled_images}) == 20


def test_without_hidden_truth_the_files_decide(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cohorts, "hidden_label", lambda item: tmp_path / "nowhere")
    assert names(shared(cache, 3).training) == names(shared(cache, 0).training)
    with pytest.raises(VolumeError, match="no hidden truth"):
        cohort = cohorts.make_cohort(TEN, "paper_like", root=cache)
        shares.pooled_site(shares.share(cohort, TEN), TEN)
