"""What each call needs: one table for the methods of gRPC and the routes of HTTP. What is not in it is refused."""

from __future__ import annotations

from dataclasses import dataclass

from tokenwire.security.principal import Scope


@dataclass(frozen=True, slots=True)
class Rule:
    """What one call needs.

    Attributes:
        scope: of the credential; None: any valid credential.
        public: no credential is asked for or looked at.
        limited: whether it counts against rates and the requests open at one time.
    """

    scope: Scope | None = None
    public: bool = False
    limited: bool = False


PUBLIC = Rule(public=True)
ANY_CREDENTIAL = Rule()
GENERATE = Rule(Scope.EXECUTE, limited=True)
EXECUTE = Rule(Scope.EXECUTE)
CANCEL = Rule(Scope.CANCEL)
MONITOR = Rule(Scope.HEALTH)
ADMIN = Rule(Scope.ADMIN)

# By service and method; `*` stands for every method of a service. Probes carry no credentials, so health is public.
METHODS: dict[str, Rule] = {
    "/tokenwire.v1.Inference/Execute": GENERATE,
    "/tokenwire.v1.Inference/Attach": EXECUTE,
    "/tokenwire.v1.Inference/Cancel": CANCEL,
    "/tokenwire.v1.Inference/Health": PUBLIC,
    "/tokenwire.v1.AdminService/*": ADMIN,
    "/grpc.health.v1.Health/*": PUBLIC,
    "/grpc.reflection.v1.ServerReflection/*": ANY_CREDENTIAL,
    "/grpc.reflection.v1alpha.ServerReflection/*": ANY_CREDENTIAL,
}

# By path of HTTP, whatever its method: a path has one use. `*` at the end stands for the rest of the path.
ROUTES: dict[str, Rule] = {
    "/": PUBLIC,
    "/openapi.json": PUBLIC,
    "/page.css": PUBLIC,
    "/page.js": PUBLIC,
    "/icon.svg": PUBLIC,
    "/health": PUBLIC,
    "/health/*": PUBLIC,
    "/execute": GENERATE,
    "/v2/execute": GENERATE,
    "/execute/*": EXECUTE,
    "/cancel": CANCEL,
    "/v1/models": EXECUTE,
    "/v1/models/*": EXECUTE,
    "/v1/completions": GENERATE,
    "/v1/chat/completions": GENERATE,
    "/metrics": MONITOR,
    "/shutdown": ADMIN,
}


def route_rule(path: str) -> Rule | None:
    """The rule of a path, as the client sent it but for percent-encoding; None: refused to everyone.

    No path is made simpler first, so that `/health/../cancel` is what it is: no path of ours.
    """
    rule = ROUTES.get(path)
    while rule is None and path:
        path = path.rpartition("/")[0]
        rule = ROUTES.get(f"{path}/*")
    return rule


def method_rule(method: str) -> Rule | None:
    """The rule of a gRPC method, given as `/package.Service/Method`; None: refused to everyone."""
    rule = METHODS.get(method)
    if rule is None:
        service = method.rpartition("/")[0]
        rule = METHODS.get(f"{service}/*")
    return rule


def markdown_table() -> str:
    """The table as docs/security.md shows it."""
    lines = ["| gRPC method, or HTTP path | Needs | Counts against the limits |", "|---|---|---|"]
    for name, rule in {**METHODS, **ROUTES}.items():
        needs = "nothing" if rule.public else "any credential" if rule.scope is None else f"`{rule.scope.value}`"
        lines.append(f"| `{name}` | {needs} | {'yes' if rule.limited else 'no'} |")
    return "\n".join(lines) + "\n"
