"""Which volumes of a cohort a run uses: how many, which of them labelled, and everything at one site."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from fedkd_utils import cohorts, transforms
from fedkd_utils.errors import VolumeError
from fedkd_utils.settings import Settings
from fedkd_utils.site_folder import Cohort, Item, Site
from fedkd_utils.transforms import SiteData

#: The labelled volumes of so many seeds do not overlap, when a fifth of the volumes is labelled.
_TURNS = 5


def share(cohort: Cohort, settings: Settings, seed: int = 0) -> Cohort:
    """The same cohort with ``client_labelled`` and ``client_unlabelled`` volumes of each client only.

    Which ones are labelled depends on the seed: a client's training and unlabelled volumes stand in a ring, and every
    seed starts a fifth of the ring further on. Seed 0 starts where the files do. With 2 of 10 volumes labelled, the
    seeds 0 to 4 label five disjoint pairs: a few-shot result hangs on who the few are. Labelled volumes are taken
    from the start, unlabelled ones from the end, so more volumes are the same ones and others besides. Validation and
    test volumes stay what they are. A site that does not hold the truth of its unlabelled volumes starts where its
    files do, whatever the seed.

    Raises:
        VolumeError: a client has fewer volumes than the settings name.
    """
    return replace(cohort, clients=tuple(_share(site, settings, seed) for site in cohort.clients))


def _share(site: Site, settings: Settings, seed: int) -> Site:
    labelled, unlabelled = settings.client_labelled, settings.client_unlabelled
    ring = [*site.training, *(replace(item, label=cohorts.hidden_label(item)) for item in site.unlabelled)]
    if len(ring) < labelled + unlabelled or len(site.training) < labelled and not _all_known(ring):
        raise VolumeError(
            f"{site.folder}: {len(site.training)} labelled and {len(site.unlabelled)} unlabelled volumes, but the "
            f"settings ask for {labelled} and {unlabelled}. Add volumes, or ask for fewer."
        )
    start = seed % _TURNS * (len(ring) // _TURNS) if _all_known(ring) else 0
    ring = ring[start:] + ring[:start]
    hidden = [replace(item, label=None) for item in ring[len(ring) - unlabelled :]]
    return replace(site, training=tuple(ring[:labelled]), unlabelled=tuple(hidden))


def _all_known(ring: Sequence[Item]) -> bool:
    return all(item.label is not None and item.label.is_file() for item in ring)


def pooled_site(cohort: Cohort, settings: Settings) -> SiteData:
    """One site that holds the volumes of all clients, with a label for every one of them, in memory.

    For the upper bound only: it breaks both rules of the course, that volumes stay and that few are labelled.

    Raises:
        VolumeError: the truth of an unlabelled volume is not there.
    """
    labelled: list[Item] = []
    validation: list[Item] = []
    for site in cohort.clients:
        hidden = [replace(item, label=cohorts.hidden_label(item)) for item in site.unlabelled]
        missing = [item.label for item in hidden if item.label is not None and not item.label.is_file()]
        if missing:
            raise VolumeError(
                f"{missing[0]}: no hidden truth, so nothing can be pooled. Leave the row out for a cohort of your own."
            )
        labelled += [*site.training, *hidden]
        validation += site.validation
    together = Site("pooled", cohort.clients[0].folder.parent, tuple(labelled), (), tuple(validation), ())
    return transforms.load_site(together, settings)
