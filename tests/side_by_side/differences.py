"""Why an answer of minserve's is another than TorchServe's; docs/torchserve.md has these in its table."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Reason:
    """Which fields of an answer may differ, and why."""

    why: str
    fields: frozenset[str] = frozenset({"body"})


CAUSE = Reason("the message says more: after TorchServe's sentence model, rank, pid and the exception")
DIED = Reason(
    "a rank's death is a 503 that can be tried again, with its cause; TorchServe has 500 and `Worker died.` for every one",
    frozenset({"status", "reason", "body"}),
)

REASONS: dict[str, Reason] = {
    **{
        f"everything: {name}": CAUSE
        for name in (
            *("handler: raise", "handler: memory", "handler: cuda", "handler: many", "handler: no list"),
            *("handler: nothing", "handler: object", "no image", "register what cannot be loaded"),
        )
    },
    "everything: handler: exit": DIED,
    "everything: too large a body": Reason(
        "the 413 has a body that says what the limit is", frozenset({"headers", "body"})
    ),
    "everything: register junk": Reason("what is wrong is the file, not that its name is not defined"),
    "everything: register an address that is not allowed": Reason(
        "no address is allowed unless allowed_urls says so; TorchServe's default is every one",
        frozenset({"status", "reason", "body"}),
    ),
    "everything: upper case type": Reason("a media type's case does not matter (RFC 9110): the body is parsed"),
    "everything: register with JSON that is none": Reason(
        "a body that is no JSON is the client's mistake: 400, and no name of a Java class",
        frozenset({"status", "reason", "body"}),
    ),
    **{
        f"everything: {name}": Reason("is always there, and tells the truth", frozenset({"status", "reason", "body"}))
        for name in ("kserve v2 without the flag", "health of kserve v2 without the flag")
    },
    "everything: ping is not here": Reason("health is told on the management address, too", DIED.fields),
    **{
        f"guarded: {name}": Reason("the message says which kinds there are")
        for name in ("token of no kind", "token without a type")
    },
    "moved: a pipeline that fails": CAUSE,
    **{
        f"envelope: {name}": Reason(
            "what is not of the envelope's form is the client's mistake: 400, not 503",
            frozenset({"status", "reason", "body"}),
        )
        for name in ("kservev2, a wrong shape", "kservev2, no inputs")
    },
    "legacy: json envelope, no JSON": Reason(
        "a request that is no JSON is the client's mistake: 400, not 503", frozenset({"status", "reason", "body"})
    ),
}
