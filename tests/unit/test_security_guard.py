"""The decision itself, without a port: hostile credentials, expiry, bounded memory, vouching between ports."""

from __future__ import annotations

from datetime import datetime, timezone
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tokenwire.errors import TokenwireError
from tokenwire.security.admission import current_admission
from tokenwire.security.guard import Credentials, Guard
from tokenwire.security.key_file import write_keys
from tokenwire.security.keys import KeyRing, create_key
from tokenwire.security.limits import MAX_PRINCIPALS
from tokenwire.security.policy import GENERATE, METHODS, PUBLIC, ROUTES, markdown_table, method_rule
from tokenwire.security.principal import ANONYMOUS, Quota, Scope

KEY = create_key("k")
NOW_S = 1_900_000_000.0


def refusal(guard: Guard, credentials: Credentials) -> TokenwireError:
    with pytest.raises(TokenwireError) as caught:
        guard.authenticate(credentials)
    return caught.value


@pytest.fixture
def keys_file(tmp_path: Path) -> Path:
    path = tmp_path / "keys.json"
    write_keys(path, KeyRing([KEY.record]))
    return path


TEXTS = st.one_of(
    st.text(),
    st.binary().map(lambda data: data.decode("latin-1")),
    st.text().map(lambda text: f"Bearer {text}"),
    st.from_regex(r"Bearer twk_[a-z2-7]{16}_[A-Za-z0-9_-]{43}", fullmatch=True),
    st.just(f"Bearer {KEY.text}x"),
    st.just(f"Bearer {KEY.text.swapcase()}"),
)


@settings(max_examples=500, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(TEXTS, max_size=3), st.lists(TEXTS, max_size=3))
def test_no_hostile_credential_gets_in_or_breaks_anything(
    keys_file: Path, authorization: list[str], api_keys: list[str]
) -> None:
    guard = Guard(keys_file)
    error = refusal(guard, Credentials(authorization, api_keys))
    assert error.code == "UNAUTHENTICATED"
    for text in (*authorization, *api_keys):
        assert len(text) < 8 or text not in str(error)
    assert guard.limiter.num_remembered == 0
    assert guard.num_open == 0


def test_the_right_key_gets_in_until_it_ends(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    key = create_key("k", expires_at=datetime.fromtimestamp(NOW_S, timezone.utc))
    write_keys(path, KeyRing([key.record]))
    clock = [NOW_S - 1]
    guard = Guard(path, wall_clock=lambda: clock[0])
    credentials = Credentials([f"Bearer {key.text}"])
    assert guard.authenticate(credentials).name == f"key:{key.record.id}"
    clock[0] = NOW_S
    assert refusal(guard, credentials).message == refusal(guard, Credentials()).message


def test_only_a_worker_without_keys_and_certificates_is_open(keys_file: Path) -> None:
    assert Guard().is_open
    assert Guard().authenticate(Credentials(["junk", "junk"])).scopes == frozenset(Scope)
    for guard in (Guard(keys_file), Guard(client_certificates=True)):
        assert not guard.is_open
        assert refusal(guard, Credentials()).code == "UNAUTHENTICATED"


def test_what_no_table_knows_is_denied_even_to_an_administrator(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    admin = create_key("admin", Scope)
    write_keys(path, KeyRing([admin.record]))
    credentials = Credentials([f"Bearer {admin.text}"])
    assert method_rule("/tokenwire.v1.Inference/New") is None
    assert method_rule("/Execute") is None
    assert method_rule("") is None
    with pytest.raises(TokenwireError, match="PERMISSION_DENIED"):
        Guard(path).authorize(method_rule("/tokenwire.v1.Inference/New"), credentials)


def test_nothing_public_is_limited_and_every_generation_is() -> None:
    for name, rule in {**METHODS, **ROUTES}.items():
        assert not (rule.public and (rule.limited or rule.scope)), name
        assert rule.limited == (rule is GENERATE), name
    assert METHODS["/grpc.health.v1.Health/*"] is PUBLIC


def test_many_certificates_take_bounded_memory() -> None:
    guard = Guard(client_certificates=True, each=Quota(requests_per_minute=10))
    for number in range(MAX_PRINCIPALS + 500):
        principal = guard.authenticate(Credentials(certificate=f"cn:{number}"))
        guard.admit(GENERATE, principal).close()
    assert guard.limiter.num_remembered == MAX_PRINCIPALS
    assert guard.num_open == 0


def test_a_port_vouches_for_another_of_its_process_only() -> None:
    here, elsewhere = Guard(client_certificates=True), Guard(client_certificates=True)
    assert here.vouched(here.vouch("uri:spiffe://a/b c")) == "uri:spiffe://a/b c"
    for value in (elsewhere.vouch("cn:a"), "", " cn:a", "cn:a", "é cn:a", "\ud800 cn:a", here.vouch("")):
        assert here.vouched(value) is None


def test_closing_twice_frees_once(keys_file: Path) -> None:
    guard = Guard(keys_file, each=Quota(concurrent_requests=2))
    principal = guard.authenticate(Credentials([f"Bearer {KEY.text}"]))
    first, second = guard.admit(GENERATE, principal), guard.admit(GENERATE, principal)
    for _ in range(3):
        first.close()
    guard.admit(GENERATE, principal)
    with pytest.raises(TokenwireError, match="OVERLOADED"):
        guard.admit(GENERATE, principal)
    second.close()
    assert guard.num_open == 1


def test_a_revocation_that_comes_first_is_not_missed(keys_file: Path) -> None:
    guard = Guard(keys_file)
    admission = guard.admit(GENERATE, guard.authenticate(Credentials([f"Bearer {KEY.text}"])))
    write_keys(keys_file, KeyRing())
    assert guard.reload() == 1
    ended: list[str] = []
    admission.on_revoked(lambda: ended.append("late"))
    assert ended == ["late"]
    with pytest.raises(TokenwireError, match="revoked"):
        admission.require_valid()


def test_without_a_guard_everyone_is_anonymous() -> None:
    assert current_admission().principal is ANONYMOUS


def test_the_documentation_shows_the_policy_in_force() -> None:
    text = (Path(__file__).parents[2] / "docs" / "security.md").read_text(encoding="utf-8")
    assert markdown_table() in text
