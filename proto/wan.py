# SPDX-License-Identifier: Apache-2.0
"""The WAN file: sites, and what the paths between them do to packets.

Every site is one peer in a network namespace of its own. A path names two sites and gives the round trip
(each way takes half of it), the rate of each direction, loss and jitter; two sites without a path see
each other undelayed. Addresses follow from the order of the sites: the n-th has 198.18.0.n, out of the
range that RFC 2544 sets aside.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Final

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from proto.labfields import PeerName
from proto.problems import Path, Problem, from_pydantic, suggestion
from proto.units import Duration, Percentage, Rate, shown

SITES: Final = 64
# Keys that the design names and that no part carries out yet.
LATER: Final = frozenset({"nat", "block", "mtu"})


def _reasonable(value: float) -> float:
    if value > 60:
        raise ValueError("more than a minute is no path's round trip")
    return value


Rtt = Annotated[Duration, AfterValidator(_reasonable)]


class WanError(ValueError):
    """A WAN file that cannot be accepted; `problems` has all that is wrong with it."""

    def __init__(self, problems: list[Problem]) -> None:
        super().__init__("; ".join(f"{p.where}: {p.message}" for p in problems[:5]))
        self.problems = problems


class Shape(BaseModel):
    """Unknown keys refused, values fixed."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Site(Shape):
    """A place where a peer is."""


class WanPath(Shape):
    """What lies between two sites; rate (bytes/s, None: no limit) and loss hold for each direction."""

    between: list[PeerName] = Field(min_length=2, max_length=2)
    rtt: Rtt = 0.0
    rate: Rate | None = None
    loss: Percentage = 0.0
    jitter: Duration = 0.0


class Wan(Shape):
    """A whole WAN file."""

    sites: dict[PeerName, Site | None] = Field(min_length=1, max_length=SITES)
    paths: list[WanPath] = Field(default_factory=list, max_length=SITES * SITES)

    def address(self, site: str) -> str:
        """The address of a site's peer."""
        return f"198.18.0.{list(self.sites).index(site) + 1}"


def parse_wan(data: object) -> Wan:
    """What a YAML or JSON reader made of a WAN file → a Wan that is right in itself. Raises WanError."""
    if not isinstance(data, Mapping):
        raise WanError([Problem((), f"a WAN file is a map with the keys sites and paths, not {shown(data)}")])
    try:
        wan = Wan.model_validate(data)
    except ValidationError as error:
        raise WanError(from_pydantic(error, Wan, later=LATER)) from None
    problems = list(_check(wan))
    if problems:
        raise WanError(problems)
    return wan


def _check(wan: Wan) -> Iterator[Problem]:
    seen: dict[frozenset[str], int] = {}
    for index, path in enumerate(wan.paths):
        place: Path = ("paths", index, "between")
        for end, site in enumerate(path.between):
            if site not in wan.sites:
                hint = suggestion(site, list(wan.sites), "the sites")
                yield Problem((*place, end), f"there is no site {site!r}{hint}")
        pair = frozenset(path.between)
        if len(pair) == 1:
            yield Problem(place, f"both ends of the path are {path.between[0]!r}")
        if seen.setdefault(pair, index) != index:
            yield Problem(place, f"there are two paths between {' and '.join(path.between)}")
        if path.jitter > path.rtt / 2:
            yield Problem((*place[:2], "jitter"), "jitter cannot be more than half of the round trip")
        if path.rate is not None and path.rate < 1000:
            yield Problem((*place[:2], "rate"), "a path carries at least 8kbit")
