# SPDX-License-Identifier: Apache-2.0
"""What a peer can be asked: the arguments of every operation, the roles, and the errors.

An operation has a name (`vm.stop`), a least role, and arguments that are a frozen model of this page. The
same model is built by `mobictl`, checked by the peer that receives the request, and checked again by the
peer it is forwarded to; unknown keys and wrong types are refused rather than guessed at. Sizes are bytes,
rates bytes/s, times seconds. A `vm` is `[LAB/]NAME`, a `peer` is a name or an id.

Operations that only peers ask of one another keep their argument models beside the module that carries them
out; they too derive from `Arguments`.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

ErrorCode = Literal[
    "not-found",
    "ambiguous",
    "exists",
    "bad-argument",
    "forbidden",
    "unreachable",
    "no-room",
    "no-leader",
    "no-majority",
    "conflict",
    "timeout",
    "failed",
    "unauthenticated",
    "too-large",
    "unsupported",
    "internal",
]

UNDECIDED: tuple[ErrorCode, ...] = ("no-leader", "no-majority")
"""The mesh could not decide; it may be able to later."""


class OperationError(Exception):
    """What an operation raises to say no: a code for programs, a sentence for people, and the mend.

    `message` says what was wrong and where; `hint` says what to do about it, or is empty. This is the only
    exception whose text reaches a user.
    """

    def __init__(self, code: ErrorCode, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.code: ErrorCode = code
        self.message = message
        self.hint = hint

    def __repr__(self) -> str:
        return f"OperationError({self.code!r}, {self.message!r}, {self.hint!r})"

    def as_dict(self) -> dict[str, str]:
        """`{code, message, hint}`, the shape on the wire and in `--json`."""
        return {"code": self.code, "message": self.message, "hint": self.hint}


class Role(IntEnum):
    """What a caller may do; each role may do what the smaller ones may."""

    ANONYMOUS = 0
    VIEWER = 1
    OPERATOR = 2
    ADMIN = 3
    PEER = 4

    @property
    def label(self) -> str:
        return self.name.lower()

    @classmethod
    def parse(cls, text: str) -> Role:
        """The role with this label; raises `OperationError(bad-argument)`."""
        for role in cls:
            if role.label == text:
                return role
        known = ", ".join(r.label for r in cls if r is not cls.ANONYMOUS)
        raise OperationError("bad-argument", f"there is no role {text!r}", f"the roles are {known}")


NAME_PATTERN = r"^[a-zA-Z0-9][a-zA-Z0-9_.-]{0,62}$"
NAME_WORDS = "a name has at most 63 letters, digits, dots, hyphens, underscores; a letter or digit first"

Name = Annotated[str, StringConstraints(pattern=NAME_PATTERN)]
"""A name of a peer, lab, guest, network: no path, no markup, at most 63 characters."""

_NAME = TypeAdapter(Name)


def check_name(text: str, what: str) -> str:
    """`text`, if it can be a name; raises `OperationError(bad-argument)` that says what it was meant for."""
    try:
        return _NAME.validate_python(text)
    except ValidationError:
        raise OperationError(
            "bad-argument",
            f"{what} {text[:80]!r} is no name",
            NAME_WORDS,
        ) from None


Reference = Annotated[str, StringConstraints(min_length=1, max_length=200)]
"""A name as a person types it; resolved by the peer that answers."""

Size = Annotated[int, Field(ge=0, lt=2**63)]
Rate = Annotated[int, Field(ge=0, lt=2**63)]
Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False, le=10 * 365 * 86400)]
Probability = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Stamp = Annotated[int, Field(ge=0, lt=2**63)]
Mode = Annotated[int, Field(ge=0, le=0o7777)]


class Arguments(BaseModel):
    """Base of all arguments: frozen, unknown keys refused, no silent conversion between types."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


ArgumentsT = TypeVar("ArgumentsT", bound=Arguments)


def parse(model: type[ArgumentsT], args: Any, op: str) -> ArgumentsT:
    """Check `args` against `model`; raises `OperationError(bad-argument)` that names each wrong key."""
    try:
        return model.model_validate(args)
    except ValidationError as error:
        problems = [
            f"{'.'.join(str(part) for part in item['loc']) or 'arguments'}: {_in_words(item)}"
            for item in error.errors(include_url=False)[:5]
        ]
        known = ", ".join(model.model_fields) or "none"
        raise OperationError(
            "bad-argument", f"{op}: {'; '.join(problems)}", f"its arguments are: {known}"
        ) from None


def _in_words(item: ErrorDetails) -> str:
    """What is wrong with one argument; a name's pattern is said in words."""
    if item.get("ctx", {}).get("pattern") == NAME_PATTERN:
        return f"{str(item['input'])[:80]!r} is no name: {NAME_WORDS}"
    return item["msg"][:1].lower() + item["msg"][1:]


class Nothing(Arguments):
    """No arguments."""


# Peers and the mesh.


class PeerArguments(Arguments):
    """`peer.show`, `peer.ping`, `peer.evict`."""

    peer: Reference


class PeerDrain(PeerArguments):
    """`peer.drain`: `undo` lets guests come again; `discard_stopped` lets stopped guests go elsewhere without
    what is on their disks."""

    undo: bool = False
    discard_stopped: bool = False


class TokenNew(Arguments):
    """`peer.token.new`: a token that admits `uses` peers or users with `role` for `ttl` seconds."""

    ttl: Annotated[float, Field(gt=0, le=365 * 86400, allow_inf_nan=False)] = 3600.0
    uses: Annotated[int, Field(ge=1, le=10_000)] = 1
    role: Literal["viewer", "operator", "admin", "peer"] = "peer"


class TokenRevoke(Arguments):
    """`peer.token.revoke`: `token` is the token's id."""

    token: Reference


class PeerJoin(Arguments):
    """`peer.join`: this peer, alone so far and without guests, joins the mesh of `token`."""

    token: Annotated[str, StringConstraints(max_length=4096)]


class MeshJoin(Arguments):
    """`mesh.join`, asked without a certificate: the token's id and secret admit a new peer."""

    token: Annotated[str, StringConstraints(max_length=64)]
    secret: Annotated[bytes, Field(max_length=64)]
    certificate: Annotated[bytes, Field(max_length=2048)]
    name: Name
    site: Annotated[str, StringConstraints(max_length=63)] = ""
    address: Annotated[str, StringConstraints(max_length=255)]
    oldest_protocol: Annotated[int, Field(ge=1, le=1000)] = 1
    newest_protocol: Annotated[int, Field(ge=1, le=1000)] = 1


class MeshLogin(Arguments):
    """`mesh.login`, asked without a certificate: the token's id and secret enrol a user's key."""

    token: Annotated[str, StringConstraints(max_length=64)]
    secret: Annotated[bytes, Field(max_length=64)]
    certificate: Annotated[bytes, Field(max_length=2048)]
    name: Name


class UserArguments(Arguments):
    """`user.rm`: a name or an id."""

    user: Reference


class Events(Arguments):
    """`events`: those not older than `since` seconds (None: all that are kept), then what follows.

    `local` asks for the answering peer's own events only; otherwise those of the whole mesh are merged.
    Events of a peer (id) up to the stamp that `after` gives for it are left out: so a reader goes on.
    """

    since: Seconds | None = None
    after: Annotated[dict[str, Stamp], Field(max_length=10_000)] = Field(default_factory=dict)
    follow: bool = False
    local: bool = False


# Labs.


class LabFile(Arguments):
    """`lab.up`, `lab.apply`, `lab.plan`: the file's content; `source` is only for messages."""

    lab: Annotated[str, StringConstraints(max_length=1 << 20)]
    source: Annotated[str, StringConstraints(max_length=4096)] = "lab file"


class LabArguments(Arguments):
    """`lab.down`, `lab.show`, `lab.graph`."""

    lab: Reference


class LabMove(LabArguments):
    """`lab.move`: all running guests of a lab go to one peer."""

    to: Reference


# Guests.


class VmRun(Arguments):
    """`vm.run`: one guest of an image in the lab `default`; 0 bytes of disk means none."""

    image: Reference
    name: Name | None = None
    memory: Size | None = None
    disk: Size = 0
    cpus: Annotated[int, Field(ge=1, le=64)] = 1
    place: Reference | None = None
    on_partition: Literal["run", "freeze"] = "run"


class VmArguments(Arguments):
    """`vm.show`, `vm.console`, `vm.pause`, `vm.resume`, `vm.start`."""

    vm: Reference


class VmForce(VmArguments):
    """`vm.stop`, `vm.restart`, `vm.rm`; `force` does not ask the guest."""

    force: bool = False


class VmExec(VmArguments):
    """`vm.exec`: items `{channel: 1|2, data}`, inputs `{channel: 0, data}`; result `{code, signal}`."""

    argv: Annotated[list[str], Field(min_length=1, max_length=1024)]
    env: dict[str, str] = Field(default_factory=dict)
    cwd: str | None = None
    tty: bool = False


class VmLogs(VmArguments):
    """`vm.logs`: items `{data, position}` of the console log; `after` is the position at which to go on."""

    follow: bool = False
    after: Annotated[list[int], Field(min_length=2, max_length=2)] | None = None


class VmGet(VmArguments):
    """`vm.get`: items `{data}`; result `{size, mode}`."""

    path: Annotated[str, StringConstraints(min_length=1, max_length=4096)]


class VmPut(VmGet):
    """`vm.put`: inputs `{data}`, the last one empty; result `{size, mode}`."""

    mode: Mode = 0o644
    size: Size | None = None


class VmMigrate(VmArguments):
    """`vm.migrate`: `downtime` is the target, `bandwidth` a ceiling (0: none)."""

    to: Reference
    downtime: Annotated[float, Field(gt=0, le=3600, allow_inf_nan=False)] = 0.05
    bandwidth: Rate = 0
    deadline: Annotated[float, Field(gt=0, le=86400, allow_inf_nan=False)] = 60.0
    mode: Literal["auto", "precopy", "postcopy", "cold"] = "auto"
    on_stall: Literal["throttle", "postcopy", "accept", "abort"] = "accept"


# Networks.


class NetArguments(Arguments):
    """`net.show`: a network or a link, `LAB:NAME`."""

    network: Reference


class NetImpair(Arguments):
    """`net.impair`: what is None stays as it is; `endpoint` (`GUEST:ethN`) limits it to one direction."""

    link: Reference
    endpoint: str | None = None
    delay: Seconds | None = None
    jitter: Seconds | None = None
    loss: Probability | None = None
    rate: Rate | None = None
    reorder: Probability | None = None
    duplicate: Probability | None = None


class Stop(Arguments):
    """`stop`: the peer ends; its guests end first unless `guests` is false."""

    guests: bool = True
